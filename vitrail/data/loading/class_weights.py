"""What each training image counts in the loss: by the size of its class, and by what its table says."""

from __future__ import annotations

import numpy as np

from vitrail.config import OptimConfig
from vitrail.data.datasets.base import Dataset


def class_weights(sizes: np.ndarray, optim: OptimConfig) -> np.ndarray:
    """Return the weight of an image of each class [C] from the classes' sizes, before it is normalised; 0 for none.

    Effective numbers: Cui et al. 2019, section 3.3.
    """
    if optim.class_weights == "none":
        return np.ones(len(sizes))
    if optim.class_weights == "inverse":
        numbers = sizes.astype(np.float64)
    else:
        numbers = (1 - optim.effective_beta**sizes) / (1 - optim.effective_beta)
    return np.divide(1.0, numbers, out=np.zeros(len(sizes)), where=sizes > 0)


def loss_weights(dataset: Dataset, part: np.ndarray, optim: OptimConfig) -> np.ndarray | None:
    """Return what each image of a source counts in the loss [N], 1 on average over `part`; None where all are 1.

    The weight of an image's class and its own in the table are multiplied.
    """
    if optim.class_weights == "none" and dataset.weights is None:
        return None
    sizes = np.bincount(dataset.targets[part], minlength=len(dataset.labels))
    weights = class_weights(sizes, optim)[dataset.targets]
    if dataset.weights is not None:
        weights = weights * dataset.weights
    return weights / weights[part].mean()


def mean_weights(dataset: Dataset, part: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return what an image of each class counts on average over `part`, for the record."""
    targets = dataset.targets[part]
    sizes = np.bincount(targets, minlength=len(dataset.labels))
    sums = np.bincount(targets, weights[part], minlength=len(dataset.labels))
    return {
        label: round(float(total / size), 6)
        for label, total, size in zip(dataset.labels, sums, sizes, strict=True)
        if size
    }
