"""What a recipe may look at of the data and of the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set and of the device that learns it, before anything is chosen.

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
