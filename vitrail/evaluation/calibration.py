"""Whether probabilities mean what they say: expected calibration error, and the temperature that fixes it."""

from __future__ import annotations

import numpy as np

BINS = 15


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def calibration_table(logits: np.ndarray, targets: np.ndarray) -> list[dict[str, float | int | None]]:
    """Return 15 equal bins of confidence with the mean confidence and the accuracy in each; None in an empty bin."""
    confidence = np.exp(log_softmax(logits).max(axis=1))
    right = logits.argmax(axis=1) == targets
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = []
    for number in range(BINS):
        chosen = bins == number
        count = int(chosen.sum())
        table.append(
            {
                "low": number / BINS,
                "high": (number + 1) / BINS,
                "confidence": float(confidence[chosen].mean()) if count else None,
                "accuracy": float(right[chosen].mean()) if count else None,
                "count": count,
            }
        )
    return table


def calibration_error(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the expected calibration error with 15 bins (Guo et al. 2017, eq. 3), 0 to 1."""
    rows = [row for row in calibration_table(logits, targets) if row["count"]]
    gaps = sum(float(row["count"] or 0) * abs((row["confidence"] or 0) - (row["accuracy"] or 0)) for row in rows)
    return gaps / len(targets)


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature with the least loss (Guo et al. 2017, section 4.2), between 1/20 and 20.

    The loss is convex in 1/T, so a bounded scalar search finds its one minimum.
    """
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(targets))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature))[rows, targets].mean())

    found = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)) if loss(float(found.x)) < loss(0.0) else 1.0
