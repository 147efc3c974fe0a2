"""One training as a user asks for it: check the data, choose, train, judge, report; or go on with a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.config import RunConfig
from vitrail.console import Talk, duration
from vitrail.data.sources import same_source
from vitrail.data.splits import save_splits
from vitrail.models.config import ENCODER_NAMES
from vitrail.models.cost import num_parameters
from vitrail.recipes import Choice, DatasetFacts, build_config, recipe_file
from vitrail.report.page import build_report
from vitrail.settings import leaves, override
from vitrail.training import parallel
from vitrail.training.attention import choose_kernels, remark_on_window
from vitrail.training.finish import finish
from vitrail.training.loop import rhythm_of
from vitrail.training.loop import train as train_loop
from vitrail.training.precision import autocast, pick_device, supports_bf16
from vitrail.training.prepare import CheckedData, TrainData, check_cache, check_data, ready_data, tell_of_cache
from vitrail.training.run import Run, check_new, create_run, has_folds, machine, new_folder, newest_folder, open_run
from vitrail.training.schedules import Schedule
from vitrail.training.signals import Stopped
from vitrail.training.start import (
    channels_of,
    check_start,
    meaning,
    note_of,
    noted_start,
    open_source_weights,
    pinned,
    ready_start,
)
from vitrail.training.weighting import loss_weights, mean_weights
from vitrail.weights.adapt import Start, refuse_misfit
from vitrail.weights.store import ModelHeader, versions


@dataclass(frozen=True)
class Result:
    """What a training left; stands for its folder wherever a path is expected, as in `vitrail.load(result)`.

    Attributes:
        folder: the run.
        evaluation: part (val, test) → its judgement, as `vitrail eval --out` writes it. Of a cross-validation: val, what all
            folds judged together.
        folds: what `folds.json` of a cross-validation holds.
    """

    folder: Path
    evaluation: Mapping[str, Any]
    folds: Mapping[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        figures = ", ".join(f"{part} accuracy {judged['top1']:.2%}" for part, judged in self.evaluation.items())
        return f"<run {self.folder}: {figures}>"

    @property
    def top1(self) -> float:
        """Share of right answers on the test part where there is one, else on the validation part."""
        return self.evaluation.get("test", self.evaluation["val"])["top1"]


def train(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
    recipe: str | None = None,
    resume: bool = False,
    talk: Talk | None = None,
    **settings: Any,
) -> Result:
    """Train on a source of labelled pictures: `vitrail train` as a function.

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
    world = parallel.join()
    talk = talk or Talk(quiet=not world.is_main)
    source = os.fspath(source)
    given = dict(settings) | ({} if model is None else meaning(model))
    folder = Path(out) if out is not None else None
    folder = world.from_main(folder or (newest_folder(source) if resume else new_folder(source)))
    data = (recipe_file(recipe or "auto") or RunConfig()).data
    folds, fold = int(given.get("data.folds", data.folds)), int(given.get("data.fold", data.fold))
    if world.from_main(has_folds(folder)) if resume else folds > 0 and fold == -1:
        from vitrail.training.folds import train_folds

        return train_folds(folder, source, recipe, given, world, talk, resume=resume)
    if resume:
        return go_on(folder, source, recipe, given, world, talk)
    return begin(folder, source, recipe or "auto", given, world, talk)


def begin(
    folder: Path,
    source: str,
    recipe: str,
    given: Mapping[str, Any],
    world: parallel.World,
    talk: Talk,
    *,
    told: bool = False,
) -> Result:
    """Start a new run.

    Args:
        told: what is chosen was told already, with another fold's run.
    """
    check_new(folder)
    base = recipe_file(recipe)
    opened = open_source_weights(base, given)
    source_header = opened.header if opened else None
    if opened and "pretrained" in given:
        given = {**given, "pretrained": pinned(given["pretrained"], opened.report.origin)}
    refuse_early(recipe, given, source_header)
    data_settings = {name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")}
    data_config = override((base or RunConfig()).data, {**data_settings, "source": source})
    channels = channels_of(base, given, source_header)
    checked = check_data(data_config, talk, channels=channels)
    refuse_idle_fractions(checked, given)
    facts = facts_of(checked, str(given.get("device", "auto")))
    config, choices = build_config(recipe, facts, {**given, "data.source": source}, source_header)
    check_runnable(config, facts.num_train, world)
    start = ready_start(config, checked.source.labels, opened)
    del opened  # for hours of training, the whole model once more
    show(checked, [] if told else choices, talk)
    learned = check_start(config, start, talk)
    data = ready_data(checked, config)
    tell_of_cache(data, config.data, talk)
    if world.is_main:
        create_run(
            folder,
            config,
            lambda path: save_splits(checked.source, checked.splits, path),
            command=command(),
            counts={part: len(indices) for part, indices in checked.splits.parts.items()},
            labels=list(checked.source.labels),
            choices=[{"setting": c.setting, "value": plain(c.value), "reason": c.reason} for c in choices],
            problems=[problem.to_dict() for problem in checked.problems],
            versions=versions(),
            machine=machine(str(pick_device(config.device)), config.precision),
            num_parameters=num_parameters(config.model),
            **weights_note(data, config),
            **learned,
            **({"start": note_of(start)} if config.pretrained else {}),
            processes=world.size,
            in_memory=data.pictures.stored is not None,
        )
    world.wait()
    return carry_out(config, data, Run(folder, world.is_main), world, talk, start)


def go_on(
    folder: Path, source: str, recipe: str | None, given: Mapping[str, Any], world: parallel.World, talk: Talk
) -> Result:
    """Go on with a run exactly as it was configured.

    Raises:
        ValueError: it is no run, it is of other data, or something differs that would make it another run.
    """
    opened, config = open_run(folder)
    run = Run(opened.folder, world.is_main)
    own = dict(leaves(config))
    if not same_source(source, config.data.source):
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
        talk.say(f"{folder} is finished already; nothing to do.")
        if run.is_main and not (folder / "report.html").exists():
            build_report(folder)
        return Result(folder, json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    if info.get("processes", 1) != world.size:
        raise ValueError(
            f"{folder}: was trained by {info['processes']} processes, not {world.size}; resume it with as many"
        )
    check_runnable(config, 1, world, schedule=False)
    checked = check_data(config.data, talk, channels=config.model.in_channels, recorded=folder / "split.json")
    data = ready_data(checked, config)
    tell_of_cache(data, config.data, talk)
    if info.get("in_memory") != (data.pictures.stored is not None):
        raise ValueError(
            f"{folder}: pictures of other sizes have come or gone since the run began, so that it would go on by another "
            "input path and not be the same run; restore the folder, or start a new run"
        )
    talk.say(f"resuming {folder}")
    run.note(status="running")
    start = noted_start(info) if world.from_main(run.has_state) else ready_start(config, checked.source.labels)
    return carry_out(config, data, run, world, talk, start)


def check_runnable(config: RunConfig, num_train: int, world: parallel.World, *, schedule: bool = True) -> None:
    """Raise what this machine or the number of steps rules out, before a folder is made.

    Raises:
        ValueError: device, precision, processes or schedule do not fit.
    """
    autocast(config, pick_device(config.device))
    choose_kernels(config, pick_device(config.device), measuring=False)  # raises what a wish rules out
    check_cache(config)
    samples = config.batch_size // world.size // config.optim.accumulate
    if config.model.is_cnn and config.model.grid == (1, 1) and samples < 2:
        raise ValueError(
            f"a CNN's batch norm needs more than one value a channel, but its map has one pixel and a part of a batch has "
            f"{samples} picture; lower optim.accumulate ({config.optim.accumulate}) or model.patch_size "
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
            f"batch_size {config.batch_size} all of it is one picture; lower augment.repeats"
        )
    if config.augment.mixes and config.batch_size // world.size % 2:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix neighbours of a batch two by two, but each of {world.size} processes has "
            f"{config.batch_size // world.size} of batch_size {config.batch_size}; try --batch-size "
            f"{config.batch_size + world.size}, or leave them out"
        )
    if schedule:
        rhythm = rhythm_of(config, num_train)
        Schedule(config.schedule, total_steps=rhythm.total, steps_per_epoch=rhythm.per_epoch)


def weights_note(data: TrainData, config: RunConfig) -> dict[str, Any]:
    """Return what `run.json` keeps of weights in the loss, where there are any."""
    part = data.splits.parts["train"]
    weights = loss_weights(data.source, part, config.optim)
    return {} if weights is None else {"loss_weights": mean_weights(data.source, part, weights)}


def refuse_idle_fractions(checked: CheckedData, given: Mapping[str, Any]) -> None:
    """Raise a ValueError when a share was asked for that the source's own parts decide."""
    own = set() if checked.source.split is None else set(checked.source.split.tolist())
    for part in ("val", "test"):
        if part in own and f"data.{part}_fraction" in given:
            raise ValueError(f"data.{part}_fraction has no effect: {checked.source.name} has its own {part} part")


def carry_out(config: RunConfig, data: TrainData, run: Run, world: parallel.World, talk: Talk, start: Start) -> Result:
    """Train to the end and finish."""
    if remark := remark_on_window(config.model):
        talk.say(remark)
    is_fold = run.folder.name == f"fold-{config.data.fold}" and has_folds(run.folder.parent)
    whole = run.folder.parent if is_fold else run.folder
    again = shlex.join(["vitrail", "train", config.data.source, "--out", str(whole), "--resume"])
    try:
        progress = train_loop(config, data, run, world, talk, start)
        run.note(train_seconds=round(progress.elapsed_s, 1))
        evaluation = finish(config, data, run, world, talk)
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
    talk.say(f"trained in {duration(progress.elapsed_s)}")
    return Result(run.folder, evaluation)


def note_quietly(run: Run, **values: Any) -> None:
    """Note how a run ended; on a full disk the reason for the end matters more than the note."""
    try:
        run.note(**values)
    except OSError:
        return


def refuse_early(recipe: str, given: Mapping[str, Any], source: ModelHeader | None) -> None:
    """Raise what can be known before the pictures are looked at: names, settings, weights that cannot fit."""
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

        # The pictures' size may yet decide the stride; a name or a stride that is given is known to be wrong now.
        fixed = "variant" in given or "model.patch_size" in given
        index_of(model.encoder, model.patch_size) if fixed else feature_strides(model.encoder)


def facts_of(checked: CheckedData, device: str) -> DatasetFacts:
    """Return what recipes may look at."""
    train_part = checked.splits.parts["train"]
    counts = np.bincount(checked.source.targets[train_part], minlength=len(checked.source.labels))
    sizes = checked.scan.sizes[checked.scan.good]
    chosen = pick_device(device)
    return DatasetFacts(
        num_train=len(train_part),
        num_classes=len(checked.source.labels),
        side=int(np.median(sizes.min(axis=1))),
        uniform=bool((sizes == sizes[0]).all()),
        channels=3 if checked.scan.colour else 1,
        flip_reason=checked.source.flip_reason,
        device=chosen.type,
        bf16=supports_bf16(chosen),
        class_sizes=(int(counts.min()), int(counts.max())),
    )


def show(checked: CheckedData, choices: list[Choice], talk: Talk) -> None:
    """Print what was found and what was chosen, a line each."""
    parts = ", ".join(f"{len(indices):,} {part}" for part, indices in checked.splits.parts.items())
    talk.say(f"{checked.source.name}: {len(checked.source.labels)} classes; {parts} ({checked.splits.rule})")
    if (weights := checked.source.weights) is not None:
        talk.say(f"  the column weight says what a picture counts in the loss: {weights.min():g} to {weights.max():g}")
    for choice in choices:
        is_model = choice.setting in ("variant", "pretrained")
        if choice.value or not is_model:
            talk.say(f"  --{'model' if is_model else choice.setting} {shown(choice.value)}: {choice.reason}")


def shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(str(each) for each in value) if isinstance(value, tuple) else str(value)


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def command() -> str:
    """Return the command line that started this process, as it can be typed again."""
    name = Path(sys.argv[0]).name
    words = ["vitrail", *sys.argv[1:]] if name in ("vitrail", "__main__.py") else ["python", *sys.argv]
    return shlex.join(words)
