"""Facts about a dataset and a machine: all that a recipe may decide by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vitrail.data.setup import CheckedData


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a dataset and of the training device before anything is chosen.

    Attributes:
        num_train: images in the training split.
        num_classes: number of labels.
        side: median short side of the images, pixels.
        uniform: whether all images have one size.
        channels: 1 when all images are grey, else 3.
        flip_reason: why images must not be mirrored; empty when they may be.
        device: cpu or cuda.
        bf16: whether the device has instructions for bfloat16.
        class_sizes: number of images in the smallest and in the largest class of the training split.
    """

    num_train: int
    num_classes: int
    side: int
    uniform: bool
    channels: int
    flip_reason: str
    device: str
    bf16: bool
    class_sizes: tuple[int, int] = (1, 1)


def facts_of(checked: CheckedData, device: str) -> DatasetFacts:
    """Return the facts about a dataset that was scanned and split, and about the device that `device` names."""
    from vitrail.device import pick_device, supports_bf16  # the command line reads recipes, and needs no torch

    train_indices = checked.splits.indices["train"]
    counts = np.bincount(checked.dataset.targets[train_indices], minlength=len(checked.dataset.labels))
    sizes = checked.scan.sizes[checked.scan.good]
    chosen = pick_device(device)
    return DatasetFacts(
        num_train=len(train_indices),
        num_classes=len(checked.dataset.labels),
        side=int(np.median(sizes.min(axis=1))),
        uniform=bool((sizes == sizes[0]).all()),
        channels=3 if checked.scan.colour else 1,
        flip_reason=checked.dataset.flip_reason,
        device=chosen.type,
        bf16=supports_bf16(chosen),
        class_sizes=(int(counts.min()), int(counts.max())),
    )
