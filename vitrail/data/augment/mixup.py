"""Mixup and cutmix of normalised images.

Images are mixed in pairs of neighbours in the batch, 2i and 2i + 1: the order is random already, and each process has
an even share of the batch, which holds whole pairs. The random numbers of a pair are those of its first image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.config import AugmentConfig


@dataclass(frozen=True)
class MixTargets:
    """The second label of each mixed image, and the share of its own one.

    Attributes:
        labels_b: class index of the other image [B]; the own one where nothing was mixed.
        lam: the own label's share [B], 0..1; 1 where nothing was mixed.
        weights_b: loss weight of the other image [B]; None where all are 1.
    """

    labels_b: Tensor
    lam: Tensor
    weights_b: Tensor | None = None

    def take(self, start: int, stop: int) -> MixTargets:
        """Return the targets of the positions `start` … `stop - 1`."""
        weights = None if self.weights_b is None else self.weights_b[start:stop]
        return MixTargets(self.labels_b[start:stop], self.lam[start:stop], weights)


def mix_pairs_(
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    positions: np.ndarray,
    config: AugmentConfig,
    draws: dict[str, np.ndarray],
    weights: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B C H W"], MixTargets | None]:
    """Mix neighbours in place: by mixup (Zhang et al. 2018) or by cutmix, which swaps a box (Yun et al. 2019).

    Args:
        positions: [B] ascending, in the process's share of the batch; without its partner an image stays unmixed.

    Returns:
        The images and their targets; None for these where mixing is off.
    """
    if not config.mixes:
        return images, None
    size = (images.shape[2], images.shape[3])
    partner, first = partners_of(positions)
    drawn = {name: values[first] for name, values in draws.items()}
    mixed = (partner != np.arange(len(positions))) & (drawn["mix"] < config.mix_chance)
    cut = drawn["mix_way"] < 0.5 if config.mixup and config.cutmix else np.full(len(positions), config.cutmix > 0)
    blend = beta(config.mixup, drawn) if config.mixup else np.ones(len(positions))
    boxes = cut_boxes(beta(config.cutmix, drawn), drawn, size) if config.cutmix else np.zeros((len(positions), 4))
    outside = 1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (size[0] * size[1])
    lam = torch.from_numpy(np.where(mixed, np.where(cut, outside, blend), 1.0)).to(images)
    others = torch.from_numpy(partner).to(images.device)
    if len(blended := np.flatnonzero(mixed & ~cut)):
        chosen = torch.from_numpy(blended).to(images.device)
        images[chosen] = images[others[chosen]].lerp_(images[chosen], lam[chosen][:, None, None, None])
    for position in np.flatnonzero(mixed & cut & (first == np.arange(len(positions)))):  # swap the small box alone
        left, top, right, bottom = boxes[position].astype(int).tolist()
        pair = [int(position), int(partner[position])]
        both = images[pair, :, top:bottom, left:right]
        images[pair, :, top:bottom, left:right] = both.flip(0)
    is_mixed = torch.from_numpy(mixed).to(images.device)
    weights_b = None if weights is None else torch.where(is_mixed, weights[others], weights)
    return images, MixTargets(torch.where(is_mixed, targets[others], targets), lam, weights_b)


def partners_of(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each image's partner and of its pair's first image [B]; its own row without a partner."""
    rows = {int(position): row for row, position in enumerate(positions)}
    partner = np.asarray([rows.get(int(position) ^ 1, row) for row, position in enumerate(positions)], dtype=np.int64)
    return partner, np.minimum(partner, np.arange(len(positions)))


def beta(alpha: float, draws: dict[str, np.ndarray]) -> np.ndarray:
    """Return samples of the distribution Beta(alpha, alpha), each from two uniform numbers.

    Source: Devroye 1996, "Random variate generation in one line of code", the symmetric beta by Bailey's Student t.
    """
    with np.errstate(divide="ignore", over="ignore"):  # a tiny alpha gives 0 or 1, as it should
        cosine = np.cos(2 * np.pi * draws["mix_angle"])
        spread = ((1 - draws["mix_radius"]) ** (-1 / alpha) - 1) * cosine**2
        return 0.5 + np.sign(cosine) / (2 * np.sqrt(1 + 1 / spread))


def cut_boxes(lam: np.ndarray, draws: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return boxes (left, top, right, bottom) [B, 4] of area 1 - lam about a random centre, cut off at the border."""
    height, width = size
    half = 0.5 * np.sqrt(1 - lam)
    across, down = np.floor(half * width), np.floor(half * height)
    x, y = np.floor(draws["mix_left"] * width), np.floor(draws["mix_top"] * height)
    sides = [np.maximum(x - across, 0), np.maximum(y - down, 0)]
    return np.stack([*sides, np.minimum(x + across, width), np.minimum(y + down, height)], axis=1)
