"""The weight of each training image in the loss: by the size of its class, and by the weights of its table."""

from __future__ import annotations

import numpy as np

from vitrail.config import OptimConfig
from vitrail.data.datasets.base import Dataset


def class_weights(sizes: np.ndarray, optim: OptimConfig) -> np.ndarray:
    """Return the weight of an image of each class [C] from the classes' sizes, not yet normalised; 0 for an empty class.

    Effective numbers: Cui et al. 2019, section 3.3.
    """
    if optim.class_weights == "none":
        return np.ones(len(sizes))
    if optim.class_weights == "inverse":
        effective_sizes = sizes.astype(np.float64)
    else:
        effective_sizes = (1 - optim.effective_beta**sizes) / (1 - optim.effective_beta)
    return np.divide(1.0, effective_sizes, out=np.zeros(len(sizes)), where=sizes > 0)


def loss_weights(dataset: Dataset, indices: np.ndarray, optim: OptimConfig) -> np.ndarray | None:
    """Return the loss weight of each image of a dataset [N], 1 on average over `indices`; None where all are 1.

    The weight of an image's class is multiplied by its own in the table.
    """
    if optim.class_weights == "none" and dataset.weights is None:
        return None
    sizes = np.bincount(dataset.targets[indices], minlength=len(dataset.labels))
    weights = class_weights(sizes, optim)[dataset.targets]
    if dataset.weights is not None:
        weights = weights * dataset.weights
    return weights / weights[indices].mean()


def mean_weights(dataset: Dataset, indices: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return the mean loss weight of each class's images among `indices`, for the record."""
    targets = dataset.targets[indices]
    sizes = np.bincount(targets, minlength=len(dataset.labels))
    sums = np.bincount(targets, weights[indices], minlength=len(dataset.labels))
    return {
        label: round(float(total / size), 6)
        for label, total, size in zip(dataset.labels, sums, sizes, strict=True)
        if size
    }
