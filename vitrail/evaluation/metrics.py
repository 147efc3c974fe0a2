"""Exact metrics over a whole split: computed once, in float64, from every image's logits."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from vitrail.evaluation.calibration import calibration_error, calibration_table, log_softmax
from vitrail.evaluation.predict_logits import Outputs


def headline_metrics(outputs: Outputs) -> dict[str, float]:
    """Return top1, top5, loss and ece, all exact means over the images (fractions, not percent)."""
    ranks = target_ranks(outputs)
    losses = -log_softmax(outputs.logits)[np.arange(len(ranks)), outputs.targets]
    return {
        "top1": float((ranks < 1).mean()),
        # With five classes or fewer every ranking holds the right one: 1 by definition.
        "top5": float((ranks < 5).mean()),
        "loss": float(losses.mean()),
        "ece": calibration_error(outputs.logits, outputs.targets),
    }


def target_ranks(outputs: Outputs) -> np.ndarray:
    """Return how many classes are ranked before the right one [N]; equal logits rank in class order, as argmax does."""
    if not np.isfinite(outputs.logits).all():
        broken = int(outputs.indices[~np.isfinite(outputs.logits).all(axis=1)][0])
        raise ValueError(f"the model's output is not finite, first for image number {broken}; its weights are broken")
    own = outputs.logits[np.arange(len(outputs.targets)), outputs.targets][:, None]
    before = np.arange(outputs.logits.shape[1]) < outputs.targets[:, None]
    return ((outputs.logits > own) | ((outputs.logits == own) & before)).sum(axis=1)


def all_metrics(outputs: Outputs, labels: tuple[str, ...], temperature: float = 1.0) -> dict[str, Any]:
    """Return everything that `vitrail eval --out` writes about a split, as JSON values.

    `loss` and `ece` are of the logits as they are; `calibrated` holds both after division by the temperature, which is
    what `vitrail predict` shows.
    """
    predicted = outputs.logits.argmax(axis=1)
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(confusion, (outputs.targets, predicted), 1)
    scaled = outputs.logits / temperature
    cooled = -log_softmax(scaled)[np.arange(len(predicted)), outputs.targets]
    return {
        **headline_metrics(outputs),
        **by_class(confusion, labels),
        "temperature": temperature,
        "calibrated": {"loss": float(cooled.mean()), "ece": calibration_error(scaled, outputs.targets)},
        "calibration": calibration_table(scaled, outputs.targets),
    }


def by_class(confusion: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what an evaluation says of the classes: `balanced_accuracy` is the mean recall of those that have images."""
    rows = per_class(confusion, labels)
    return {
        "balanced_accuracy": fmean(row["recall"] for row in rows.values() if row["recall"] is not None),
        "num_images": int(confusion.sum()),
        "labels": list(labels),
        "per_class": rows,
        "confusion": confusion.tolist(),
    }


def per_class(confusion: np.ndarray, labels: tuple[str, ...]) -> dict[str, dict[str, float | int | None]]:
    """Return precision, recall, F1 and count of each label; None where a figure is undefined (nothing to divide by)."""
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    out = {}
    for i, label in enumerate(labels):
        both = int(true[i] + predicted[i])
        out[label] = {
            "precision": float(right[i] / predicted[i]) if predicted[i] else None,
            "recall": float(right[i] / true[i]) if true[i] else None,
            "f1": float(2 * right[i] / both) if both else None,
            "count": int(true[i]),
        }
    return out
