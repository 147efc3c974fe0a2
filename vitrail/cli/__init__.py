"""The command line: `vitrail COMMAND …`, with one file a command.

A command file holds `HELP` (one line of `vitrail --help`), `Options` (a dataclass whose fields are the flags) and
`run(options)`, which carries the command out, prints, and returns the exit code. To add a command, add a file of this
shape and a line in `COMMANDS`. Heavy imports stand inside the functions: `vitrail --help` needs no PyTorch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import tyro

import vitrail
from vitrail.cli import check, doctor, eval, export, models, predict, probe, report, shard, train
from vitrail.cli.options import options_of
from vitrail.cli.output import INTERRUPTED, OK, USAGE_ERROR, fail
from vitrail.console import Console
from vitrail.lookup import unknown

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "check": check,
    "eval": eval,
    "predict": predict,
    "export": export,
    "probe": probe,
    "shard": shard,
    "report": report,
    "doctor": doctor,
    "models": models,
}


def main() -> None:
    """Run the command line of this process and exit with its code."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command line, given as the arguments after `vitrail`, and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        Console().terminal.print(overview())
        return OK if arguments else USAGE_ERROR
    if arguments[0] in ("-V", "--version", "version"):
        Console().info(f"vitrail {vitrail.__version__}")
        return OK
    if arguments[0] not in COMMANDS:
        return fail(f"{unknown('command', arguments[0], COMMANDS)}. See vitrail --help", USAGE_ERROR)
    command = COMMANDS[arguments[0]]
    try:
        options = tyro.cli(
            options_of(command),
            prog=f"vitrail {arguments[0]}",
            description=command.HELP,
            args=arguments[1:],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        return OK if stop.code in (0, None) else USAGE_ERROR
    return run_guarded(command.run, options)


def run_guarded(command: Callable[[Any], int], options: Any) -> int:
    """Run a command; an error that the user can fix becomes one message instead of a traceback.

    With `VITRAIL_TRACEBACK` in the environment the traceback is shown all the same.
    """
    try:
        return command(options)
    except KeyboardInterrupt:
        return fail("stopped", INTERRUPTED)
    except BrokenPipeError:  # an OSError, but `main` answers it
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("VITRAIL_TRACEBACK"):
            raise
        return fail(message_of(error))


def message_of(error: ValueError | OSError) -> str:
    """Return the message of an error; for a system error the file's name and the reason."""
    if not isinstance(error, OSError):
        return str(error)
    location = f"{error.filename}: " if error.filename else ""
    return f"{location}{error.strerror or error}"


def overview() -> str:
    """Return the text of `vitrail --help`."""
    lines = [f"  [bold]{name:<9}[/]{command.HELP}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"[bold]vitrail {vitrail.__version__}[/]: train, evaluate and use Vision Transformers on your own images.\n",
            "usage: vitrail COMMAND …\n",
            *lines,
            "\nStart with:  vitrail train digits",
            "Then:        vitrail train photos/   (photos/<class>/*.jpg, or photos/{train,val,test}/<class>/*.jpg)",
            "More:        vitrail COMMAND --help",
        ]
    )
