"""What each training picture counts in the loss: by the size of its class, and by what its table says."""

from __future__ import annotations

import numpy as np

from vitrail.config import OptimConfig
from vitrail.data.datasets.base import Dataset


def class_weights(sizes: np.ndarray, optim: OptimConfig) -> np.ndarray:
    """Return the weight of a picture of each class [C] from the classes' sizes, before it is normalised; 0 for none.

    Effective numbers: Cui et al. 2019, section 3.3.
    """
    if optim.class_weights == "none":
        return np.ones(len(sizes))
    if optim.class_weights == "inverse":
        numbers = sizes.astype(np.float64)
    else:
        numbers = (1 - optim.effective_beta**sizes) / (1 - optim.effective_beta)
    return np.divide(1.0, numbers, out=np.zeros(len(sizes)), where=sizes > 0)


def loss_weights(source: Dataset, part: np.ndarray, optim: OptimConfig) -> np.ndarray | None:
    """Return what each picture of a source counts in the loss [N], 1 on average over `part`; None where all are 1.

    The weight of a picture's class and its own in the table are multiplied.
    """
    if optim.class_weights == "none" and source.weights is None:
        return None
    sizes = np.bincount(source.targets[part], minlength=len(source.labels))
    weights = class_weights(sizes, optim)[source.targets]
    if source.weights is not None:
        weights = weights * source.weights
    return weights / weights[part].mean()


def mean_weights(source: Dataset, part: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return what a picture of each class counts on average over `part`, for the record."""
    targets = source.targets[part]
    sizes = np.bincount(targets, minlength=len(source.labels))
    sums = np.bincount(targets, weights[part], minlength=len(source.labels))
    return {
        label: round(float(total / size), 6)
        for label, total, size in zip(source.labels, sums, sizes, strict=True)
        if size
    }
