"""One training as a user asks for it: check the data, choose, train, judge, report; or go on with a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.config import RunConfig
from vitrail.console import Talk, duration
from vitrail.data.splits import save_splits
from vitrail.recipes import Choice, Facts, build_config
from vitrail.settings import leaves, override
from vitrail.training import parallel
from vitrail.training.finish import finish
from vitrail.training.loop import train as train_loop
from vitrail.training.precision import autocast, pick_device, supports_bf16
from vitrail.training.prepare import CheckedData, check_data, ready_data
from vitrail.training.run import Run, check_new, create_run, machine, new_folder, newest_folder, open_run
from vitrail.training.signals import Stopped
from vitrail.weights.store import versions


@dataclass(frozen=True)
class Result:
    """What a training left.

    Attributes:
        folder: the run; `vitrail.load(result.folder)` is its classifier.
        evaluation: part (val, test) → its judgement, as `vitrail eval --out` writes it.
    """

    folder: Path
    evaluation: Mapping[str, Any]

    @property
    def top1(self) -> float:
        """Share of right answers on the test part where there is one, else on the validation part."""
        return self.evaluation.get("test", self.evaluation["val"])["top1"]


def train(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
    recipe: str = "auto",
    resume: bool = False,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Train on a source of labelled pictures: `vitrail train` as a function.

    Args:
        source: `digits`, or a folder of class folders.
        out: the run's folder; `runs/<data name>` unless given.
        model: a variant's name such as `ti16`.
        recipe: a recipe's name or an earlier run's config.json.
        resume: go on with the run in `out`.
        settings: any setting by its dotted name, for instance `epochs=10` or `**{"optim.lr": 3e-4}`.

    Raises:
        ValueError: the data, a setting or the folder cannot be used; the message says what to do.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    world = parallel.join()
    talk = talk or Talk(quiet=not world.is_main)
    source = os.fspath(source)
    given = dict(settings) | ({"variant": model} if model is not None else {})
    folder = Path(out) if out is not None else None
    if resume:
        return go_on(folder or newest_folder(source), source, recipe, given, world, talk)
    return begin(folder or new_folder(source), source, recipe, given, world, talk)


def begin(
    folder: Path, source: str, recipe: str, given: Mapping[str, Any], world: parallel.World, talk: Talk
) -> Result:
    """Start a new run."""
    data_settings = {name: value for name, value in given.items() if name.startswith("data.")}
    data_config = override(RunConfig(), {**data_settings, "data.source": source}).data
    refuse_early(folder, recipe, given)
    checked = check_data(data_config, talk, channels=int(given.get("model.in_channels", 0)))
    facts = facts_of(checked, str(given.get("device", "auto")))
    config, choices = build_config(recipe, facts, {**given, "data.source": source})
    pick_device(config.device)
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size {config.batch_size} is global and must be a multiple of the {world.size} processes"
        )
    show(checked, choices, talk)
    device = str(pick_device(config.device))
    run = Run(folder, world.is_main)
    if world.is_main:
        create_run(
            folder,
            config,
            command=command(),
            counts={part: len(indices) for part, indices in checked.splits.parts.items()},
            labels=list(checked.source.labels),
            choices=[{"setting": c.setting, "value": plain(c.value), "reason": c.reason} for c in choices],
            problems=[problem.to_dict() for problem in checked.problems],
            versions=versions(),
            machine=machine(device, config.precision),
        )
        save_splits(checked.source, checked.splits, folder / "split.json")
    world.wait()
    return carry_out(config, checked, run, world, talk)


def go_on(
    folder: Path, source: str, recipe: str, given: Mapping[str, Any], world: parallel.World, talk: Talk
) -> Result:
    """Go on with a run exactly as it was configured.

    Raises:
        ValueError: it is no run, it is of other data, or a setting differs from the run's own.
    """
    opened, config = open_run(folder)
    run = Run(opened.folder, world.is_main)
    own = dict(leaves(config))
    if not same_source(source, config.data.source):
        raise ValueError(f"{folder}: is a run of {config.data.source}, not of {source}; resume it with its own data")
    for name, value in given.items():
        if name not in own:
            override(config, {name: value})
        if own[name] != (tuple(value) if isinstance(value, list) else value):
            raise ValueError(
                f"{folder}: --resume goes on exactly as configured, with {name} {own[name]!r}, not {value!r}; "
                "leave the setting out, or start a new run with --recipe " + str(folder / "config.json")
            )
    info = run.info()
    if info.get("status") == "finished":
        talk.say(f"{folder} is finished already; nothing to do.")
        return Result(folder, json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    checked = check_data(config.data, talk, channels=config.model.in_channels, recorded=folder / "split.json")
    talk.say(f"resuming {folder}")
    run.note(status="running")
    return carry_out(config, checked, run, world, talk)


def carry_out(config: RunConfig, checked: CheckedData, run: Run, world: parallel.World, talk: Talk) -> Result:
    """Train to the end and finish."""
    autocast(
        config, pick_device(config.device)
    )  # refuses a precision that the device cannot compute, before anything else
    data = ready_data(checked, config)
    started_at = time.monotonic()
    before_s = run.info().get("train_seconds", 0.0)
    again = shlex.join(["vitrail", "train", config.data.source, "--out", str(run.folder), "--resume"])
    try:
        train_loop(config, data, run, world, talk)
    except Stopped as stop:
        run.note(status="stopped", train_seconds=round(before_s + time.monotonic() - started_at, 1))
        stop.command = again
        raise
    except OSError as error:
        note_quietly(run, status="failed")
        raise OSError(
            error.errno,
            f"{error.strerror or error}. What was saved before is whole; free some space and go on with: {again}",
            error.filename,
        ) from None
    seconds = before_s + time.monotonic() - started_at
    run.note(train_seconds=round(seconds, 1))
    evaluation = finish(config, data, run, world, talk)
    talk.say(f"trained in {duration(seconds)}")
    return Result(run.folder, evaluation)


def note_quietly(run: Run, **values: Any) -> None:
    """Note how a run ended; on a full disk the reason for the end matters more than the note."""
    try:
        run.note(**values)
    except OSError:
        return


def refuse_early(folder: Path, recipe: str, given: Mapping[str, Any]) -> None:
    """Raise what can be known before the pictures are looked at: folder, names, settings."""
    check_new(folder)
    nothing = Facts(1000, 2, 32, True, 3, "", "cpu", False, 1)
    build_config(recipe, nothing, given)


def facts_of(checked: CheckedData, device: str) -> Facts:
    """Return what recipes may look at."""
    train_part = checked.splits.parts["train"]
    sizes = checked.scan.sizes[checked.scan.good]
    chosen = pick_device(device)
    return Facts(
        num_train=len(train_part),
        num_classes=len(checked.source.labels),
        side=int(np.median(sizes.min(axis=1))),
        uniform=bool((sizes == sizes[0]).all()),
        channels=3 if checked.scan.colour else 1,
        flip_reason=checked.source.flip_reason,
        device=chosen.type,
        bf16=supports_bf16(chosen),
        cores=os.cpu_count() or 1,
    )


def show(checked: CheckedData, choices: list[Choice], talk: Talk) -> None:
    """Print what was found and what was chosen, a line each."""
    parts = ", ".join(f"{len(indices):,} {part}" for part, indices in checked.splits.parts.items())
    talk.say(f"{checked.source.name}: {len(checked.source.labels)} classes; {parts} ({checked.splits.rule})")
    for choice in choices:
        talk.say(
            f"  --{'model' if choice.setting == 'variant' else choice.setting} {shown(choice.value)}: {choice.reason}"
        )


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(str(each) for each in value) if isinstance(value, tuple) else str(value)


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def same_source(one: str, other: str) -> bool:
    """Whether two words name the same data."""
    return one == other or (one != "digits" and other != "digits" and Path(one).resolve() == Path(other).resolve())


def command() -> str:
    """Return the command line that started this process, as it can be typed again."""
    name = Path(sys.argv[0]).name
    words = ["vitrail", *sys.argv[1:]] if name in ("vitrail", "__main__.py") else ["python", *sys.argv]
    return shlex.join(words)
