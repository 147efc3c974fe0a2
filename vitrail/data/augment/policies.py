"""Published augmentation policies: RandAugment, TrivialAugment and 3-Augment, a batch at a time.

Every operation is torchvision's own, on 8-bit pixels, called once for all images of a batch that drew the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.images.preprocess import unit_scale

BINS = 31  # levels of strength from none to the strongest, in both papers' code
_COLOUR_ONLY = ("color", "greyscale")
SIGMAS = tuple(tenths / 10 for tenths in range(1, 21))  # of a blur, pixels: DeiT III's 0.1 to 2, in steps

_CHUNK = 2  # images

# Operation → torchvision's function `tv` on uint8 pixels [B, C, H, W] at a strength. Shears are tan(angle).
OPERATIONS: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    "identity": lambda tv, pixels, strength: pixels,
    "shear_x": lambda tv, pixels, strength: _affine(tv, pixels, shear=[math.degrees(math.atan(strength)), 0.0]),
    "shear_y": lambda tv, pixels, strength: _affine(tv, pixels, shear=[0.0, math.degrees(math.atan(strength))]),
    "translate_x": lambda tv, pixels, strength: _affine(tv, pixels, translate=[int(strength), 0]),
    "translate_y": lambda tv, pixels, strength: _affine(tv, pixels, translate=[0, int(strength)]),
    "rotate": lambda tv, pixels, strength: tv.rotate(pixels, strength),
    "brightness": lambda tv, pixels, strength: tv.adjust_brightness(pixels, 1.0 + strength),
    "color": lambda tv, pixels, strength: tv.adjust_saturation(pixels, 1.0 + strength),
    "contrast": lambda tv, pixels, strength: tv.adjust_contrast(pixels, 1.0 + strength),
    "sharpness": lambda tv, pixels, strength: tv.adjust_sharpness(pixels, 1.0 + strength),
    "posterize": lambda tv, pixels, strength: tv.posterize(pixels, int(strength)),
    "solarize": lambda tv, pixels, strength: tv.solarize(pixels, 255.0 * strength),
    "autocontrast": lambda tv, pixels, strength: tv.autocontrast(pixels),
    "equalize": lambda tv, pixels, strength: tv.equalize(pixels),
    "greyscale": lambda tv, pixels, strength: tv.rgb_to_grayscale(pixels, num_output_channels=pixels.shape[1]),
    "blur": lambda tv, pixels, strength: tv.gaussian_blur(pixels, _kernel_sizes(pixels), [strength, strength]),
}
# Operation → its strongest form; None where it has no strength. What a strength means is in `strength_of`.
STRONGEST: dict[str, dict[str, float | None]] = {
    "randaugment": {
        "identity": None,
        "shear_x": 0.3,
        "shear_y": 0.3,
        "translate_x": 150 / 331,  # of the side
        "translate_y": 150 / 331,
        "rotate": 30.0,
        "brightness": 0.9,
        "color": 0.9,
        "contrast": 0.9,
        "sharpness": 0.9,
        "posterize": 4.0,  # bits taken away
        "solarize": 1.0,
        "autocontrast": None,
        "equalize": None,
    },
    "trivialaugment": {
        "identity": None,
        "shear_x": 0.99,
        "shear_y": 0.99,
        "translate_x": 32.0,  # pixels
        "translate_y": 32.0,
        "rotate": 135.0,
        "brightness": 0.99,
        "color": 0.99,
        "contrast": 0.99,
        "sharpness": 0.99,
        "posterize": 6.0,
        "solarize": 1.0,
        "autocontrast": None,
        "equalize": None,
    },
    "three_augment": {"greyscale": None, "solarize": None, "blur": None},
}


def apply_policy(
    images: Float[Tensor, "B C H W"], config: AugmentConfig, draws: dict[str, np.ndarray]
) -> Float[Tensor, "B C H W"]:
    """Augment images of values 0..1 by the policy, as drawn; they are rounded to 8 bits, for which it was published.

    Source: Cubuk et al. 2020 (RandAugment); Müller & Hutter 2021 (TrivialAugment, wide); Touvron et al. 2022 (DeiT III,
    3-Augment, whose flip and colour jitter are settings of their own).
    """
    if config.policy == "none":
        return images
    from torchvision.transforms.v2 import functional

    pixels = to_levels(images)
    for operations in choose_operations(
        config, draws, channels=pixels.shape[1], size=(pixels.shape[2], pixels.shape[3])
    ):
        groups: dict[tuple[str, float], list[int]] = {}
        for position, operation in enumerate(operations):
            groups.setdefault(operation, []).append(position)
        for (name, strength), positions in groups.items():
            if name != "identity":
                chosen = torch.tensor(positions, device=pixels.device)
                pixels[chosen] = OPERATIONS[name](functional, pixels[chosen], strength)
    return unit_scale(pixels)


def to_levels(images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """Round values 0..1 to 0..255, a few images at a time on a CPU: they stay in its cache between the operations."""
    pixels = torch.empty_like(images, dtype=torch.uint8)
    few = _CHUNK if images.device.type == "cpu" else max(1, len(images))
    for values, levels in zip(images.split(few), pixels.split(few), strict=True):
        levels.copy_((values * 255).round_().clamp_(0, 255))
    return pixels


def choose_operations(
    config: AugmentConfig, draws: dict[str, np.ndarray], *, channels: int, size: tuple[int, int]
) -> list[list[tuple[str, float]]]:
    """Return for each operation in turn the (name, strength) that each image of a batch gets.

    Grey images get no operations on colour, which would do nothing to them; others are drawn instead.
    """
    if config.policy == "none":
        return []
    names = [name for name in STRONGEST[config.policy] if channels == 3 or name not in _COLOUR_ONLY]
    num_ops = config.policy_ops if config.policy == "randaugment" else 1
    steps = np.full(len(draws["strength"]), config.policy_magnitude)
    if config.policy != "randaugment":
        steps = (draws["strength"] * (BINS if config.policy == "trivialaugment" else len(SIGMAS))).astype(int)
    operations = []
    for number in range(1, num_ops + 1):
        chosen = [names[int(drawn * len(names))] for drawn in draws[f"op_{number}"]]
        negative = draws[f"sign_{number}"] <= 0.5
        operations.append(
            [
                (name, strength_of(config.policy, name, int(step), bool(minus), size))
                for name, step, minus in zip(chosen, steps, negative, strict=True)
            ]
        )
    return operations


def strength_of(policy: str, name: str, step: int, negative: bool, size: tuple[int, int]) -> float:
    """Return how strong an operation is at a step from 0 to 30, for images of `size` (h, w); 0 where it has no strength.

    Shears are tan(angle), translations pixels, rotations degrees, `posterize` the bits that stay, `solarize` the share of
    the greatest value from which pixels are inverted, `blur` sigma in pixels; the others are added to a factor of 1.
    """
    if policy == "three_augment":
        return {"greyscale": 0.0, "solarize": 128 / 255, "blur": SIGMAS[min(step, len(SIGMAS) - 1)]}[name]
    strongest = STRONGEST[policy][name]
    if strongest is None:
        return 0.0
    if name == "posterize":
        return float(round(8 - step / ((BINS - 1) / strongest)))  # half to even, as torch
    if name == "solarize":
        return float(torch.linspace(strongest, 0.0, BINS)[step])
    if policy == "randaugment" and name.startswith("translate"):
        strongest *= size[1] if name == "translate_x" else size[0]
    strength = float(torch.linspace(0.0, strongest, BINS)[step])
    return -strength if negative else strength


def _affine(
    tv: Any, pixels: Tensor, *, translate: Sequence[int] = (0, 0), shear: Sequence[float] = (0.0, 0.0)
) -> Tensor:
    """Shear about the upper left corner, as in AutoAugment, or shift."""
    centre = [0, 0] if any(shear) else None
    return tv.affine(pixels, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=centre)


def _kernel_sizes(pixels: Tensor) -> list[int]:
    """Return a width and height that hold the widest blur to three sigma, or as much as the image can mirror."""
    radius = math.ceil(3 * SIGMAS[-1])
    return [2 * min(radius, side - 1) + 1 for side in (pixels.shape[3], pixels.shape[2])]
