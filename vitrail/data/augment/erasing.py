"""Random erasing of normalised images (Zhong et al. 2020): a box of each chosen image is filled."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.config import AugmentConfig

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # section 5.1


def erase_(
    images: Float[Tensor, "B C H W"], config: AugmentConfig, draws: dict[str, np.ndarray]
) -> Float[Tensor, "B C H W"]:
    """Fill a box of some normalised images, in place, with zeros (the data's mean) or with noise of its deviation.

    Source: Zhong et al. 2020, algorithm 1; a box that would be longer than the image is cut off instead of drawn again.
    """
    chosen = np.flatnonzero(draws["erase"] < config.erasing)
    if not len(chosen):
        return images
    boxes = erased_boxes(draws, (images.shape[2], images.shape[3])).astype(int)
    for position in chosen:
        left, top, right, bottom = boxes[position].tolist()
        box = images[position, :, top:bottom, left:right]
        if config.erasing_fill == "mean":
            box.zero_()
        else:  # a generator for each image, on the host: the same noise on every device and beside any other image
            generator = torch.Generator().manual_seed(int(draws["erase_noise"][position] * 2**53))
            box.copy_(torch.randn(box.shape, generator=generator))
    return images


def erased_boxes(draws: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return boxes (left, top, right, bottom) [B, 4] in pixels: area and log aspect ratio are uniform."""
    height, width = size
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws["erase_area"])
    low, high = math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])
    ratio = np.exp(low + (high - low) * draws["erase_ratio"])
    tall = np.clip(np.round(np.sqrt(area * ratio)), 1, height)
    wide = np.clip(np.round(np.sqrt(area / ratio)), 1, width)
    left = np.floor(draws["erase_left"] * (width - wide + 1))
    top = np.floor(draws["erase_top"] * (height - tall + 1))
    return np.stack([left, top, left + wide, top + tall], axis=1)
