"""What a recipe may look at of the data and of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vitrail.data.setup import CheckedData


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a dataset and of the device that learns it, before anything is chosen.

    Attributes:
        num_train: images in the training split.
        num_classes: labels.
        side: median short side of the images, pixels.
        uniform: whether all images have one size.
        channels: 1 when all images are grey, else 3.
        flip_reason: why images must not be mirrored; empty when they may.
        device: cpu or cuda.
        bf16: whether the device computes bfloat16 on its own instructions.
        class_sizes: images in the smallest and in the largest class of the training split.
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
    """Return what recipes may look at."""
    from vitrail.device import pick_device, supports_bf16  # the command line reads recipes, and needs no torch

    train_part = checked.splits.indices["train"]
    counts = np.bincount(checked.dataset.targets[train_part], minlength=len(checked.dataset.labels))
    sizes = checked.scan.sizes[checked.scan.good]
    chosen = pick_device(device)
    return DatasetFacts(
        num_train=len(train_part),
        num_classes=len(checked.dataset.labels),
        side=int(np.median(sizes.min(axis=1))),
        uniform=bool((sizes == sizes[0]).all()),
        channels=3 if checked.scan.colour else 1,
        flip_reason=checked.dataset.flip_reason,
        device=chosen.type,
        bf16=supports_bf16(chosen),
        class_sizes=(int(counts.min()), int(counts.max())),
    )
