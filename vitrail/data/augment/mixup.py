"""Random changes of normalised images: boxes that are erased, and images that are mixed two by two.

Partners are neighbours in the batch, 2i and 2i + 1: the order is random already, and an even share of a batch holds both
on whatever process it is. A pair is mixed by the numbers of its first image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.config import AugmentConfig

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2020, section 5.1


@dataclass(frozen=True)
class MixTargets:
    """What mixed images show besides their own label.

    Attributes:
        partners: class index of the other image [B]; the own one where nothing was mixed.
        shares: the own label's share [B], 0..1; 1 where nothing was mixed.
        weights: what the other image counts in the loss [B]; None where all count alike.
    """

    labels_b: Tensor
    lam: Tensor
    weights_b: Tensor | None = None

    def take(self, start: int, stop: int) -> MixTargets:
        """Return that of some of the batch."""
        weights = None if self.weights_b is None else self.weights_b[start:stop]
        return MixTargets(self.labels_b[start:stop], self.lam[start:stop], weights)


def erase_(
    images: Float[Tensor, "B C H W"], config: AugmentConfig, draws: dict[str, np.ndarray]
) -> Float[Tensor, "B C H W"]:
    """Fill a box of some normalised images, in place, with zeros, the data's mean, or with noise of its deviation.

    Source: Zhong et al. 2020, algorithm 1; a box that would be longer than the image is cut off instead of drawn again.
    """
    chosen = np.flatnonzero(draws["erase"] < config.erasing)
    if not len(chosen):
        return images
    boxes = erased_boxes(draws, (images.shape[2], images.shape[3])).astype(int)
    for place in chosen:
        left, top, right, bottom = boxes[place].tolist()
        box = images[place, :, top:bottom, left:right]
        if config.erasing_fill == "mean":
            box.zero_()
        else:  # a generator for each image, on the host: the same noise on every device and beside any other image
            generator = torch.Generator().manual_seed(int(draws["erase_noise"][place] * 2**53))
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


def mix_pairs_(
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    places: np.ndarray,
    config: AugmentConfig,
    draws: dict[str, np.ndarray],
    weights: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B C H W"], MixTargets | None]:
    """Mix neighbours in place: blended (Zhang et al. 2018) or one put into a box of the other (Yun et al. 2019).

    Args:
        places: [B] ascending places in the process's share of the batch; one that is missing leaves its partner unmixed.

    Returns:
        The images, and what they show; None where mixing is off.
    """
    if not config.mixes:
        return images, None
    size = (images.shape[2], images.shape[3])
    partner, first = partners_of(places)
    drawn = {name: values[first] for name, values in draws.items()}
    mixed = (partner != np.arange(len(places))) & (drawn["mix"] < config.mix_chance)
    cut = drawn["mix_way"] < 0.5 if config.mixup and config.cutmix else np.full(len(places), config.cutmix > 0)
    blend = beta(config.mixup, drawn) if config.mixup else np.ones(len(places))
    boxes = cut_boxes(beta(config.cutmix, drawn), drawn, size) if config.cutmix else np.zeros((len(places), 4))
    rest = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (size[0] * size[1])
    shares = torch.from_numpy(np.where(mixed, np.where(cut, rest, blend), 1.0)).to(images)
    others = torch.from_numpy(partner).to(images.device)
    if len(blended := np.flatnonzero(mixed & ~cut)):
        here = torch.from_numpy(blended).to(images.device)
        images[here] = images[others[here]].lerp_(images[here], shares[here][:, None, None, None])
    for one in np.flatnonzero(mixed & cut & (first == np.arange(len(places)))):  # a box is a small part: swap it alone
        left, top, right, bottom = boxes[one].astype(int).tolist()
        both = images[[int(one), int(partner[one])], :, top:bottom, left:right]
        images[[int(one), int(partner[one])], :, top:bottom, left:right] = both.flip(0)
    mixed_here = torch.from_numpy(mixed).to(images.device)
    theirs_weigh = None if weights is None else torch.where(mixed_here, weights[others], weights)
    return images, MixTargets(torch.where(mixed_here, targets[others], targets), shares, theirs_weigh)


def partners_of(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image where its partner and its pair's first one lie [B]; itself, when its partner is missing."""
    where = {int(place): number for number, place in enumerate(places)}
    partner = np.asarray([where.get(int(place) ^ 1, number) for number, place in enumerate(places)], dtype=np.int64)
    return partner, np.minimum(partner, np.arange(len(places)))


def beta(alpha: float, draws: dict[str, np.ndarray]) -> np.ndarray:
    """Return numbers of the distribution Beta(alpha, alpha), from two uniform ones each.

    Source: Devroye 1996, "Random variate generation in one line of code", the symmetric beta by Bailey's Student t.
    """
    with np.errstate(divide="ignore", over="ignore"):  # a tiny alpha gives 0 or 1, as it should
        cosine = np.cos(2 * np.pi * draws["mix_angle"])
        spread = ((1 - draws["mix_radius"]) ** (-1 / alpha) - 1) * cosine**2
        return 0.5 + np.sign(cosine) / (2 * np.sqrt(1 + 1 / spread))


def cut_boxes(shares: np.ndarray, draws: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return boxes (left, top, right, bottom) [B, 4] of area 1 - share about a centre anywhere, cut off at the border."""
    height, width = size
    half = 0.5 * np.sqrt(1 - shares)
    across, down = np.floor(half * width), np.floor(half * height)
    x, y = np.floor(draws["mix_left"] * width), np.floor(draws["mix_top"] * height)
    sides = [np.maximum(x - across, 0), np.maximum(y - down, 0)]
    return np.stack([*sides, np.minimum(x + across, width), np.minimum(y + down, height)], axis=1)
