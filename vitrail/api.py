"""`vitrail.train`: check the data, choose, train, evaluate, report; or go on with a run, or train one for each fold."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitrail import distributed
from vitrail.config import RunConfig, load_config
from vitrail.config_schema import leaves, override
from vitrail.console import Console, duration
from vitrail.data.datasets.open import same_dataset
from vitrail.data.setup import CheckedData, build_train_data, load_data, report_cache
from vitrail.distributed import World
from vitrail.models.kernel_choice import remark_on_window
from vitrail.recipes import Choice, build_config, recipe_file
from vitrail.recipes.facts import facts_of
from vitrail.report.run_page import build_report
from vitrail.training.cross_validation import count_folds, is_killed_start, print_summary, save_summary, summarise_folds
from vitrail.training.final_evaluation import evaluate_best_weights
from vitrail.training.loop import train_steps
from vitrail.training.preflight import check_runnable, refuse_early, refuse_idle_fractions
from vitrail.training.run_folder import (
    FIRST_FOLD,
    Run,
    check_new,
    create_run,
    has_folds,
    new_run_folder,
    newest_run_folder,
    open_run,
)
from vitrail.training.run_record import describe_run
from vitrail.training.session import Session
from vitrail.training.signals import Stopped
from vitrail.training.start import (
    load_start,
    open_start_weights,
    parse_model_spec,
    pin_revision,
    report_start,
    required_channels,
    start_from_record,
    start_record,
)
from vitrail.weights.adapt import Start


@dataclass(frozen=True)
class Result:
    """What a training left; stands for its folder wherever a path is expected, as in `vitrail.load(result)`.

    Attributes:
        folder: the run.
        evaluation: split (val, test) → its evaluation, as `vitrail eval --out` writes it. Of a cross-validation: val, what all
            folds evaluated together.
        folds: what `folds.json` of a cross-validation holds.
    """

    folder: Path
    evaluation: Mapping[str, Any]
    folds: Mapping[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        figures = ", ".join(f"{split} accuracy {evaluated['top1']:.2%}" for split, evaluated in self.evaluation.items())
        return f"<run {self.folder}: {figures}>"

    @property
    def top1(self) -> float:
        """Share of right answers on the test split where there is one, else on the validation split."""
        return self.evaluation.get("test", self.evaluation["val"])["top1"]


@dataclass(frozen=True)
class Request:
    """What a user asks of a training, before anything is chosen.

    Attributes:
        folder: of the run, or of the runs of a cross-validation.
        source: the data, as it was typed.
        recipe: its name or file; None where none was given.
        given: the settings that the user has fixed, by dotted name.
    """

    folder: Path
    source: str
    recipe: str | None
    given: Mapping[str, Any]
    world: World
    console: Console

    @property
    def recipe_or_auto(self) -> str:
        """The recipe to train a new run with."""
        return self.recipe or "auto"


def train(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
    recipe: str | None = None,
    resume: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Result:
    """Train on a source of labelled images: `vitrail train` as a function.

    Args:
        source: `digits`, a folder of class folders, a table, `torchvision:NAME`, or `hf:…`.
        out: the run's folder; `runs/<data name>` unless given.
        model: a variant's name such as `ti16`, or trained weights to start from: a run, a model or weights file, `hf:…`,
            `timm:…`.
        recipe: a recipe's name (`auto` unless given) or an earlier run's config.json.
        resume: go on with the run, or with the folds, in `out`.
        settings: any setting by its dotted name, for instance `epochs=10` or `**{"optim.lr": 3e-4}`.

    Raises:
        ValueError: the data, a setting or the folder cannot be used; the message says what to do.
        Stopped: SIGINT or SIGTERM came; the state is saved.
    """
    world = distributed.init()
    console = console or Console(quiet=not world.is_main)
    source = os.fspath(source)
    given = dict(settings) | ({} if model is None else parse_model_spec(model))
    folder = Path(out) if out is not None else None
    folder = world.broadcast(folder or (newest_run_folder(source) if resume else new_run_folder(source)))
    request = Request(folder, source, recipe, given, world, console)
    if world.broadcast(has_folds(folder)) if resume else count_folds(request.recipe_or_auto, given, all_only=True):
        return train_folds(request, resume=resume)
    return resume_run(request) if resume else start_run(request)


def start_run(request: Request, *, print_choices: bool = True) -> Result:
    """Check the data, choose, and train a new run.

    Args:
        print_choices: whether choices are printed; not where those of another fold were.
    """
    check_new(request.folder)
    recipe, given = request.recipe_or_auto, request.given
    base = recipe_file(recipe)
    opened = open_start_weights(base, given)
    header = opened.header if opened else None
    if opened and "pretrained" in given:
        given = {**given, "pretrained": pin_revision(given["pretrained"], opened.report.origin)}
    refuse_early(recipe, given, header)
    data_settings = {name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")}
    data_config = override((base or RunConfig()).data, {**data_settings, "source": request.source})
    channels = required_channels(base, given, header)
    checked = load_data(data_config, request.console, request.world, channels=channels)
    refuse_idle_fractions(checked, given)
    facts = facts_of(checked, str(given.get("device", "auto")))
    config, choices = build_config(recipe, facts, {**given, "data.source": request.source}, header)
    check_runnable(config, facts.num_train, request.world)
    start = load_start(config, checked.dataset.labels, opened)
    del opened  # for hours of training, the whole model once more
    print_data(checked, choices if print_choices else [], request.console)
    num_learning = report_start(config, start, request.console)
    session = open_session(request, config, checked)
    if session.run.is_main:
        about = {**num_learning, **({"start": start_record(start)} if config.pretrained else {})}
        create_run(session.run.folder, config, checked, **describe_run(session, checked, choices), **about)
    request.world.barrier()
    return run_to_end(session, start)


def open_session(request: Request, config: RunConfig, checked: CheckedData) -> Session:
    """Return the session of a run whose configuration is known and whose data was checked."""
    data = build_train_data(checked, config, request.world)
    report_cache(data, config.data, request.console)
    run = Run(request.folder, request.world.is_main)
    return Session(config, data, run, request.world, request.console)


def resume_run(request: Request) -> Result:
    """Go on with a run exactly as it was configured.

    Raises:
        ValueError: it is no run, it is of other data, or something differs that would make it another run.
    """
    folder, world = request.folder, request.world
    opened, config = open_run(folder)
    refuse_changes(request, config)
    info = opened.info()
    if info.get("status") == "finished":
        request.console.info(f"{folder} is finished already; nothing to do.")
        if world.is_main and not (folder / "report.html").exists():
            build_report(folder)
        return Result(folder, json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    if info.get("processes", 1) != world.size:
        raise ValueError(
            f"{folder}: was trained by {info['processes']} processes, not {world.size}; resume it with as many"
        )
    check_runnable(config, 1, world, schedule=False)
    checked = load_data(
        config.data, request.console, world, channels=config.model.in_channels, recorded=folder / "split.json"
    )
    session = open_session(request, config, checked)
    if info.get("in_memory") != (session.data.reader.stored is not None):
        raise ValueError(
            f"{folder}: images of other sizes have come or gone since the run began, so that it would go on by another "
            "input path and not be the same run; restore the folder, or start a new run"
        )
    request.console.info(f"resuming {folder}")
    session.run.note(status="running")
    has_state = world.broadcast(session.run.has_state)
    start = start_from_record(info) if has_state else load_start(config, checked.dataset.labels)
    return run_to_end(session, start)


def refuse_changes(request: Request, config: RunConfig) -> None:
    """Raise a ValueError when what is asked for differs from what the run was configured with."""
    folder, own = request.folder, dict(leaves(config))
    if not same_dataset(request.source, config.data.source):
        raise ValueError(
            f"{folder}: is a run of {config.data.source}, not of {request.source}; resume it with its own data"
        )
    for name, value in {**request.given, **({"recipe": request.recipe} if request.recipe else {})}.items():
        if name == "variant" and config.pretrained:  # a folder that has gone since reads like a variant's name
            name, value = "pretrained", os.path.abspath(value)
        if name not in own:
            override(config, {name: value})
        pinned = name == "pretrained" and own[name].startswith(f"{value}@")  # the revision was looked up at the start
        if own[name] != (tuple(value) if isinstance(value, list) else value) and not pinned:
            raise ValueError(
                f"{folder}: --resume goes on exactly as configured, with {name} {own[name]!r}, not {value!r}; "
                "leave the setting out, or start a new run with --recipe " + str(folder / "config.json")
            )


def run_to_end(session: Session, start: Start) -> Result:
    """Train to the last step, evaluate and report; what ends a run early is noted in its folder."""
    config, run, console = session.config, session.run, session.console
    if remark := remark_on_window(config.model):
        console.info(remark)
    command = resume_command(session)
    try:
        progress = train_steps(session, start)
        run.note(train_seconds=round(progress.elapsed_s, 1))
        evaluation = evaluate_best_weights(session)
        run.note(status="finished")
        if run.is_main:
            build_report(run.folder)
        session.world.barrier()
    except Stopped as stop:
        run.note(status="stopped")
        stop.command = command
        raise
    except OSError as error:
        note_quietly(run, status="failed")
        raise OSError(
            error.errno,
            f"{error.strerror or error}. What was saved before is whole; free some space and go on with: {command}",
            error.filename,
        ) from None
    except torch.OutOfMemoryError as error:
        note_quietly(run, status="failed")
        raise ValueError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}). Start anew with --optim.accumulate "
            f"{2 * config.optim.accumulate}, which computes the same steps in smaller parts, or a smaller --batch-size"
        ) from None
    except Exception:
        note_quietly(run, status="failed")
        raise
    console.info(f"trained in {duration(progress.elapsed_s)}")
    return Result(run.folder, evaluation)


def resume_command(session: Session) -> str:
    """Return the command line that goes on with a run, or with the cross-validation that it belongs to."""
    folder = session.run.folder
    is_fold = folder.name == f"fold-{session.config.data.fold}" and has_folds(folder.parent)
    whole = folder.parent if is_fold else folder
    return shlex.join(["vitrail", "train", session.config.data.source, "--out", str(whole), "--resume"])


def note_quietly(run: Run, **values: Any) -> None:
    """Note how a run ended; on a full disk the reason for the end matters more than the note."""
    try:
        run.note(**values)
    except OSError:
        return


def train_folds(request: Request, *, resume: bool) -> Result:
    """Train a run `fold-0`, `fold-1`, … for each fold, and write `folds.json` when the last one is done.

    The recipe chooses for the first fold; the others are trained with its configuration.

    Args:
        resume: go on with the folds that are not finished.

    Raises:
        ValueError: the folder or a setting cannot be used.
    """
    folder, console = request.folder, request.console
    count = folds_to_train(request, resume=resume)
    evaluations = []
    for number in range(count):
        own = dataclasses.replace(request, folder=folder / f"fold-{number}")
        console.info(f"fold {number} of {count} (from 0): {own.folder}")
        evaluations.append(train_fold(own, number, first=folder / FIRST_FOLD).evaluation)
    summary = {"source": request.source, **summarise_folds(evaluations)}
    print_summary(summary, console)
    if request.world.is_main:
        save_summary(summary, folder)
    request.world.barrier()
    return Result(folder, {"val": summary["pooled"]}, summary)


def train_fold(request: Request, number: int, *, first: Path) -> Result:
    """Train one fold of a cross-validation, or go on with it.

    Args:
        first: the run of the first fold.
    """
    own = {**request.given, "data.fold": number}
    if request.world.broadcast((request.folder / "run.json").exists()):
        recipe = request.recipe if number == 0 else None
        return resume_run(dataclasses.replace(request, given=own, recipe=recipe))
    if number == 0:
        return start_run(dataclasses.replace(request, given=own))
    same = dataclasses.replace(request, given={"data.fold": number}, recipe=str(first / "config.json"))
    return start_run(same, print_choices=False)


def folds_to_train(request: Request, *, resume: bool) -> int:
    """Return how many folds there are to train.

    Raises:
        ValueError: the folder cannot be used, or one fold alone is asked for of many.
    """
    folder = request.folder
    if not resume:
        if not is_killed_start(folder):
            check_new(folder)
        return count_folds(request.recipe_or_auto, request.given)
    count = load_config(folder / FIRST_FOLD / "config.json").data.folds
    if (number := request.given.get("data.fold", -1)) != -1:
        raise ValueError(
            f"{folder}: holds {count} folds, and --resume goes on with all; go on with this one alone by --out "
            f"{folder / f'fold-{number}'}"
        )
    return count


def print_data(checked: CheckedData, choices: list[Choice], console: Console) -> None:
    """Print what was found and what was chosen, a line each."""
    splits = ", ".join(f"{len(indices):,} {split}" for split, indices in checked.splits.indices.items())
    console.info(f"{checked.dataset.name}: {len(checked.dataset.labels)} classes; {splits} ({checked.splits.rule})")
    if (weights := checked.dataset.weights) is not None:
        console.info(
            f"  the column weight says what an image counts in the loss: {weights.min():g} to {weights.max():g}"
        )
    for choice in choices:
        is_model = choice.setting in ("variant", "pretrained")
        if choice.value or not is_model:
            console.info(f"  --{'model' if is_model else choice.setting} {cli_value(choice.value)}: {choice.reason}")


def cli_value(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(str(each) for each in value) if isinstance(value, tuple) else str(value)
