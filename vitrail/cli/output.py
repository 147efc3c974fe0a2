"""Output that commands share: exit codes, the error message, a JSON file, a note beside an accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from vitrail.config import UNEVEN
from vitrail.console import printable

# Done; an error that the user can fix; a command line that cannot be read; Ctrl-C, as shells count it (128 + SIGINT).
OK, USER_ERROR, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130


def fail(message: str, code: int = USER_ERROR) -> int:
    """Print an error message on standard error and return the exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    console.print(f"[bold red]error:[/] {printable(message)}")
    return code


def write_json(path: str, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    from vitrail.files import write_text  # a tenth of the time of `vitrail --help`

    write_text(Path(path), json.dumps(value, indent=2) + "\n")


def recall_note(metrics: Mapping[str, Any]) -> str:
    """Return the mean recall of the classes as text to follow the accuracy, or nothing where class sizes are even.

    Where they are uneven, the accuracy says little about the small classes.
    """
    counts = [row["count"] for row in metrics["per_class"].values() if row["count"]]
    if "balanced_accuracy" not in metrics or max(counts) < UNEVEN * min(counts):
        return ""
    return f"; mean recall of the classes {metrics['balanced_accuracy']:.2%}, since they are uneven"
