"""Cross-validation: a run for each fold, and what they say together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from vitrail.api import Result, resume_run, start
from vitrail.config import RunConfig, load_config
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.distributed import World
from vitrail.evaluation.metrics import by_class
from vitrail.files import write_text
from vitrail.recipes import recipe_file
from vitrail.training.run_folder import FIRST_FOLD, check_new

# What is averaged over the folds, and how people call it.
AVERAGED_METRICS = {
    "top1": "accuracy",
    "top5": "top-5",
    "loss": "loss",
    "ece": "calibration error",
    "balanced_accuracy": "mean recall of the classes",
}


def train_folds(
    folder: Path,
    source: str,
    recipe: str | None,
    given: Mapping[str, Any],
    world: World,
    console: Console,
    *,
    resume: bool,
) -> Result:
    """Train a run `fold-0`, `fold-1`, … for each fold, and write `folds.json` when the last one is done.

    The recipe chooses for the first fold; the others are trained with its configuration.

    Args:
        resume: go on with the folds that are not finished.

    Raises:
        ValueError: the folder or a setting cannot be used.
    """
    first = folder / FIRST_FOLD
    if resume:
        count = load_config(first / "config.json").data.folds
        if (number := given.get("data.fold", -1)) != -1:
            raise ValueError(
                f"{folder}: holds {count} folds, and --resume goes on with all; go on with this one alone by --out "
                f"{folder / f'fold-{number}'}"
            )
    else:
        if not is_killed_start(folder):
            check_new(folder)
        settings = {name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")}
        count = override((recipe_file(recipe or "auto") or RunConfig()).data, settings).folds
    evaluations = []
    for number in range(count):
        place, own = folder / f"fold-{number}", {**given, "data.fold": number}
        console.info(f"fold {number} of {count} (from 0): {place}")
        if world.broadcast((place / "run.json").exists()):
            result = resume_run(place, source, recipe if number == 0 else None, own, world, console)
        elif number == 0:
            result = start(place, source, recipe or "auto", own, world, console)
        else:
            same = {"data.fold": number}
            result = start(place, source, str(first / "config.json"), same, world, console, told=True)
        evaluations.append(result.evaluation)
    found = {"source": source, **summarise_folds(evaluations)}
    for part, figures in found["parts"].items():
        console.info(f"{part} split, mean ± standard deviation over {count} folds:")
        for name, word in AVERAGED_METRICS.items():
            console.info(f"  {word:<28}{percent(name, figures['mean'][name], figures['deviation'][name])}")
    if world.is_main:
        write_text(folder / "folds.json", json.dumps(found, indent=2) + "\n")
    world.barrier()
    return Result(folder, {"val": found["pooled"]}, found)


def is_killed_start(folder: Path) -> bool:
    """Whether a folder holds no more than what a start leaves that was killed before the first fold was a run."""
    return folder.is_dir() and [each.name for each in folder.iterdir()] == [FIRST_FOLD]


def summarise_folds(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `folds.json` holds.

    `parts` has, for val (and test, which every fold's model evaluates whole), each fold's figures, their mean and their
    standard deviation (n - 1). `pooled` is of all images, each evaluated by the fold that was not trained on it.
    """
    parts = {}
    for part in ("val", "test"):
        if all(part in each for each in evaluations):
            rows = [{name: each[part][name] for name in (*AVERAGED_METRICS, "num_images")} for each in evaluations]
            columns = {name: [row[name] for row in rows] for name in AVERAGED_METRICS}
            parts[part] = {
                "mean": {name: fmean(values) for name, values in columns.items()},
                "deviation": {name: stdev(values) for name, values in columns.items()},
                "each": rows,
            }
    judged = [each["val"] for each in evaluations]
    confusion = np.sum([each["confusion"] for each in judged], axis=0)
    total = int(confusion.sum())
    pooled = {
        name: sum(each[name] * each["num_images"] for each in judged) / total for name in ("top1", "top5", "loss")
    }
    pooled |= by_class(confusion, tuple(judged[0]["labels"]))
    return {"folds": len(evaluations), "parts": parts, "pooled": pooled}


def percent(name: str, mean: float, deviation: float) -> str:
    """Return a figure for people: the loss as it is, shares in percent."""
    return f"{mean:.4f} ± {deviation:.4f}" if name == "loss" else f"{mean:.2%} ± {deviation:.2%}"
