"""Cross-validation: how many folds are asked for, and what their runs say together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from vitrail.config import RunConfig
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.evaluation.metrics import by_class
from vitrail.files import write_text
from vitrail.recipes import recipe_file
from vitrail.training.run_folder import FIRST_FOLD

# What is averaged over the folds, and how people call it.
AVERAGED_METRICS = {
    "top1": "accuracy",
    "top5": "top-5",
    "loss": "loss",
    "ece": "calibration error",
    "balanced_accuracy": "mean recall of the classes",
}


def count_folds(recipe: str, given: Mapping[str, Any], *, all_only: bool = False) -> int:
    """Return how many folds a training is asked for, 0: none.

    Args:
        recipe: a recipe's name or file.
        given: the settings that the user has fixed.
        all_only: count none where one fold alone is asked for.

    Raises:
        ValueError: a setting of the data is refused.
    """
    base = (recipe_file(recipe) or RunConfig()).data
    if all_only and (int(given.get("data.fold", base.fold)) != -1 or int(given.get("data.folds", base.folds)) <= 0):
        return 0
    settings = {name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")}
    return override(base, settings).folds


def is_killed_start(folder: Path) -> bool:
    """Whether a folder holds no more than what a start leaves that was killed before the first fold was a run."""
    return folder.is_dir() and [each.name for each in folder.iterdir()] == [FIRST_FOLD]


def summarise_folds(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `folds.json` holds.

    `parts` has, for val (and test, which every fold's model evaluates whole), each fold's figures, their mean and their
    standard deviation (n - 1). `pooled` is of all images, each evaluated by the fold that was not trained on it.
    """
    parts = {}
    for split in ("val", "test"):
        if all(split in each for each in evaluations):
            rows = [{name: each[split][name] for name in (*AVERAGED_METRICS, "num_images")} for each in evaluations]
            columns = {name: [row[name] for row in rows] for name in AVERAGED_METRICS}
            parts[split] = {
                "mean": {name: fmean(values) for name, values in columns.items()},
                "deviation": {name: stdev(values) for name, values in columns.items()},
                "each": rows,
            }
    on_val = [each["val"] for each in evaluations]
    confusion = np.sum([each["confusion"] for each in on_val], axis=0)
    total = int(confusion.sum())
    pooled = {
        name: sum(each[name] * each["num_images"] for each in on_val) / total for name in ("top1", "top5", "loss")
    }
    pooled |= by_class(confusion, tuple(on_val[0]["labels"]))
    return {"folds": len(evaluations), "parts": parts, "pooled": pooled}


def percent(name: str, mean: float, deviation: float) -> str:
    """Return a figure for people: the loss as it is, shares in percent."""
    return f"{mean:.4f} ± {deviation:.4f}" if name == "loss" else f"{mean:.2%} ± {deviation:.2%}"


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the mean and the deviation of every metric, for every split."""
    for split, figures in summary["parts"].items():
        console.info(f"{split} split, mean ± standard deviation over {summary['folds']} folds:")
        for name, word in AVERAGED_METRICS.items():
            console.info(f"  {word:<28}{percent(name, figures['mean'][name], figures['deviation'][name])}")


def save_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Write `folds.json`."""
    write_text(folder / "folds.json", json.dumps(summary, indent=2) + "\n")
