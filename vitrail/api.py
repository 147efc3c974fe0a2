"""One training as a user asks for it: check the data, choose, train, evaluate, report; or go on with a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitrail import distributed
from vitrail.config import RunConfig
from vitrail.config_schema import leaves, override
from vitrail.console import Console, duration
from vitrail.data.datasets.open import same_dataset
from vitrail.data.loading.class_weights import loss_weights, mean_weights
from vitrail.data.setup import CheckedData, TrainData, build_train_data, check_cache_settings, load_data, report_cache
from vitrail.data.splits.splits import save_splits
from vitrail.device import autocast, pick_device
from vitrail.distributed import World
from vitrail.models.config import ENCODER_NAMES
from vitrail.models.cost import num_parameters
from vitrail.models.kernel_choice import remark_on_window
from vitrail.optim.schedules import Schedule
from vitrail.recipes import Choice, DatasetFacts, build_config, recipe_file
from vitrail.recipes.facts import facts_of
from vitrail.report.run_page import build_report
from vitrail.training.finish import evaluate_best_weights
from vitrail.training.loop import build_cadence
from vitrail.training.loop import train_steps as train_loop
from vitrail.training.run_folder import (
    Run,
    check_new,
    create_run,
    has_folds,
    machine,
    new_folder,
    newest_folder,
    open_run,
)
from vitrail.training.signals import Stopped
from vitrail.training.start import (
    choose_kernels,
    load_start,
    open_start_weights,
    parse_model_spec,
    pin_revision,
    report_start,
    required_channels,
    start_from_record,
    start_record,
)
from vitrail.weights.adapt import Start, refuse_misfit
from vitrail.weights.model_file import ModelHeader, versions


@dataclass(frozen=True)
class Result:
    """What a training left; stands for its folder wherever a path is expected, as in `vitrail.load(result)`.

    Attributes:
        folder: the run.
        evaluation: part (val, test) → its evaluation, as `vitrail eval --out` writes it. Of a cross-validation: val, what all
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
    folder = world.broadcast(folder or (newest_folder(source) if resume else new_folder(source)))
    data = (recipe_file(recipe or "auto") or RunConfig()).data
    folds, fold = int(given.get("data.folds", data.folds)), int(given.get("data.fold", data.fold))
    if world.broadcast(has_folds(folder)) if resume else folds > 0 and fold == -1:
        from vitrail.training.cross_validation import train_folds

        return train_folds(folder, source, recipe, given, world, console, resume=resume)
    if resume:
        return resume_run(folder, source, recipe, given, world, console)
    return start(folder, source, recipe or "auto", given, world, console)


def start(
    folder: Path,
    source: str,
    recipe: str,
    given: Mapping[str, Any],
    world: World,
    console: Console,
    *,
    told: bool = False,
) -> Result:
    """Start a new run.

    Args:
        told: what is chosen was told already, with another fold's run.
    """
    check_new(folder)
    base = recipe_file(recipe)
    opened = open_start_weights(base, given)
    source_header = opened.header if opened else None
    if opened and "pretrained" in given:
        given = {**given, "pretrained": pin_revision(given["pretrained"], opened.report.origin)}
    refuse_early(recipe, given, source_header)
    data_settings = {name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")}
    data_config = override((base or RunConfig()).data, {**data_settings, "source": source})
    channels = required_channels(base, given, source_header)
    checked = load_data(data_config, console, channels=channels)
    refuse_idle_fractions(checked, given)
    facts = facts_of(checked, str(given.get("device", "auto")))
    config, choices = build_config(recipe, facts, {**given, "data.source": source}, source_header)
    check_runnable(config, facts.num_train, world)
    start = load_start(config, checked.dataset.labels, opened)
    del opened  # for hours of training, the whole model once more
    print_choices(checked, [] if told else choices, console)
    learned = report_start(config, start, console)
    data = build_train_data(checked, config)
    report_cache(data, config.data, console)
    if world.is_main:
        create_run(
            folder,
            config,
            lambda path: save_splits(checked.dataset, checked.splits, path),
            command=command(),
            counts={part: len(indices) for part, indices in checked.splits.indices.items()},
            labels=list(checked.dataset.labels),
            choices=[{"setting": c.setting, "value": json_value(c.value), "reason": c.reason} for c in choices],
            problems=[problem.to_dict() for problem in checked.problems],
            versions=versions(),
            machine=machine(str(pick_device(config.device)), config.precision),
            num_parameters=num_parameters(config.model),
            **weights_note(data, config),
            **learned,
            **({"start": start_record(start)} if config.pretrained else {}),
            processes=world.size,
            in_memory=data.reader.stored is not None,
        )
    world.barrier()
    return run_to_end(config, data, Run(folder, world.is_main), world, console, start)


def resume_run(
    folder: Path, source: str, recipe: str | None, given: Mapping[str, Any], world: World, console: Console
) -> Result:
    """Go on with a run exactly as it was configured.

    Raises:
        ValueError: it is no run, it is of other data, or something differs that would make it another run.
    """
    opened, config = open_run(folder)
    run = Run(opened.folder, world.is_main)
    own = dict(leaves(config))
    if not same_dataset(source, config.data.source):
        raise ValueError(f"{folder}: is a run of {config.data.source}, not of {source}; resume it with its own data")
    for name, value in {**given, **({} if recipe is None else {"recipe": recipe})}.items():
        if (
            name == "variant" and config.pretrained
        ):  # a folder that has gone since the start reads like a variant's name
            name, value = "pretrained", os.path.abspath(value)
        if name not in own:
            override(config, {name: value})
        again = name == "pretrained" and own[name].startswith(f"{value}@")  # the revision was looked up at the start
        if own[name] != (tuple(value) if isinstance(value, list) else value) and not again:
            raise ValueError(
                f"{folder}: --resume goes on exactly as configured, with {name} {own[name]!r}, not {value!r}; "
                "leave the setting out, or start a new run with --recipe " + str(folder / "config.json")
            )
    info = run.info()
    if info.get("status") == "finished":
        console.info(f"{folder} is finished already; nothing to do.")
        if run.is_main and not (folder / "report.html").exists():
            build_report(folder)
        return Result(folder, json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    if info.get("processes", 1) != world.size:
        raise ValueError(
            f"{folder}: was trained by {info['processes']} processes, not {world.size}; resume it with as many"
        )
    check_runnable(config, 1, world, schedule=False)
    checked = load_data(config.data, console, channels=config.model.in_channels, recorded=folder / "split.json")
    data = build_train_data(checked, config)
    report_cache(data, config.data, console)
    if info.get("in_memory") != (data.reader.stored is not None):
        raise ValueError(
            f"{folder}: images of other sizes have come or gone since the run began, so that it would go on by another "
            "input path and not be the same run; restore the folder, or start a new run"
        )
    console.info(f"resuming {folder}")
    run.note(status="running")
    start = start_from_record(info) if world.broadcast(run.has_state) else load_start(config, checked.dataset.labels)
    return run_to_end(config, data, run, world, console, start)


def check_runnable(config: RunConfig, num_train: int, world: World, *, schedule: bool = True) -> None:
    """Raise what this machine or the number of steps rules out, before a folder is made.

    Raises:
        ValueError: device, precision, processes or schedule do not fit.
    """
    device = pick_device(config.device)
    autocast(config.precision, device)
    choose_kernels(config, device, measuring=False)  # raises what a wish rules out
    check_cache_settings(config)
    samples = config.batch_size // world.size // config.optim.accumulate
    if config.model.is_cnn and config.model.grid == (1, 1) and samples < 2:
        raise ValueError(
            f"a CNN's batch norm needs more than one value a channel, but its map has one pixel and a part of a batch has "
            f"{samples} image; lower optim.accumulate ({config.optim.accumulate}) or model.patch_size "
            f"({config.model.patch_size}), or raise batch_size ({config.batch_size})"
        )
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size {config.batch_size} is global and must be a multiple of the {world.size} processes; "
            f"try --batch-size {-(-config.batch_size // world.size) * world.size}"
        )
    if config.augment.mixes and config.augment.repeats == config.batch_size:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix neighbours of a batch, but with augment.repeats {config.augment.repeats} and "
            f"batch_size {config.batch_size} all of it is one image; lower augment.repeats"
        )
    if config.augment.mixes and config.batch_size // world.size % 2:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix neighbours of a batch two by two, but each of {world.size} processes has "
            f"{config.batch_size // world.size} of batch_size {config.batch_size}; try --batch-size "
            f"{config.batch_size + world.size}, or leave them out"
        )
    if schedule:
        cadence = build_cadence(config, num_train)
        Schedule(config.schedule, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch)


def weights_note(data: TrainData, config: RunConfig) -> dict[str, Any]:
    """Return what `run.json` keeps of weights in the loss, where there are any."""
    part = data.splits.indices["train"]
    weights = loss_weights(data.dataset, part, config.optim)
    return {} if weights is None else {"loss_weights": mean_weights(data.dataset, part, weights)}


def refuse_idle_fractions(checked: CheckedData, given: Mapping[str, Any]) -> None:
    """Raise a ValueError when a share was asked for that the source's own parts decide."""
    own = set() if checked.dataset.split is None else set(checked.dataset.split.tolist())
    for part in ("val", "test"):
        if part in own and f"data.{part}_fraction" in given:
            raise ValueError(f"data.{part}_fraction has no effect: {checked.dataset.name} has its own {part} split")


def run_to_end(config: RunConfig, data: TrainData, run: Run, world: World, console: Console, start: Start) -> Result:
    """Train to the end and finish."""
    if remark := remark_on_window(config.model):
        console.info(remark)
    is_fold = run.folder.name == f"fold-{config.data.fold}" and has_folds(run.folder.parent)
    whole = run.folder.parent if is_fold else run.folder
    again = shlex.join(["vitrail", "train", config.data.source, "--out", str(whole), "--resume"])
    try:
        progress = train_loop(config, data, run, world, console, start)
        run.note(train_seconds=round(progress.elapsed_s, 1))
        evaluation = evaluate_best_weights(config, data, run, world, console)
    except Stopped as stop:
        run.note(status="stopped")
        stop.command = again
        raise
    except OSError as error:
        note_quietly(run, status="failed")
        raise OSError(
            error.errno,
            f"{error.strerror or error}. What was saved before is whole; free some space and go on with: {again}",
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


def note_quietly(run: Run, **values: Any) -> None:
    """Note how a run ended; on a full disk the reason for the end matters more than the note."""
    try:
        run.note(**values)
    except OSError:
        return


def refuse_early(recipe: str, given: Mapping[str, Any], source: ModelHeader | None) -> None:
    """Raise what can be known before the images are looked at: names, settings, weights that cannot fit."""
    if "model.num_classes" in given:
        raise ValueError("model.num_classes is the number of classes of the data; leave it out")
    channels = int(given.get("model.in_channels", len(given.get("preprocess.mean", (0.5, 0.5, 0.5)))))
    nothing = DatasetFacts(1000, 2, 224, True, channels, "", "cpu", False)
    config = build_config(recipe, nothing, given, source)[0]
    model = config.model
    if source is not None:
        refuse_misfit(source.architecture, model, config.pretrained)
    if model.is_cnn and model.encoder not in ENCODER_NAMES:
        from vitrail.models.cnns import feature_strides, index_of

        # The images' size may yet decide the stride; a name or a stride that is given is known to be wrong now.
        fixed = "variant" in given or "model.patch_size" in given
        index_of(model.encoder, model.patch_size) if fixed else feature_strides(model.encoder)


def print_choices(checked: CheckedData, choices: list[Choice], console: Console) -> None:
    """Print what was found and what was chosen, a line each."""
    parts = ", ".join(f"{len(indices):,} {part}" for part, indices in checked.splits.indices.items())
    console.info(f"{checked.dataset.name}: {len(checked.dataset.labels)} classes; {parts} ({checked.splits.rule})")
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


def json_value(value: Any) -> Any:
    """Return a value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def command() -> str:
    """Return the command line that started this process, as it can be typed again."""
    name = Path(sys.argv[0]).name
    words = ["vitrail", *sys.argv[1:]] if name in ("vitrail", "__main__.py") else ["python", *sys.argv]
    return shlex.join(words)
