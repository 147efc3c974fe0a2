"""Random crops, flips, rotation, shift and colour of training images, a batch at a time.

Every number is drawn from (seed, visit, image) alone, so results do not depend on workers, processes or resuming.
Geometry is one affine resample: crop, flip, rotation and shift together blur once, not four times.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.augment.policies import apply_policy
from vitrail.data.images.preprocess import unit_scale

_PADDING = {"black": "zeros", "edge": "border", "mirror": "reflection"}
# Names of an image's random numbers, by what each decides.
_DRAWS = (
    "area",
    "ratio",
    "left",
    "top",
    "flip",
    "vertical",
    "angle",
    "right",
    "down",
    "bright",
    "contrast",
    "saturation",
    # Later ones come at the end, so that the same seed goes on giving the same crops.
    "op_1",
    "sign_1",
    "op_2",
    "sign_2",
    "op_3",
    "sign_3",
    "op_4",
    "sign_4",
    "strength",
    "erase",
    "erase_area",
    "erase_ratio",
    "erase_left",
    "erase_top",
    "erase_noise",
    "mix",
    "mix_way",
    "mix_radius",
    "mix_angle",
    "mix_left",
    "mix_top",
)


def draw_changes(seed: int, visits: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return uniform numbers in [0, 1) for each image of a batch, by name: [B] float64.

    A counter-based generator (splitmix64's finaliser, Steele et al. 2014, figure 17): no state to save or to share.
    """
    columns = np.arange(1, len(_DRAWS) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = scramble(np.uint64(seed) + _GOLDEN)
        state = scramble(state ^ scramble(visits.astype(np.uint64) * _GOLDEN + np.uint64(1)))
        state = scramble(state ^ scramble(indices.astype(np.uint64) * _GOLDEN + np.uint64(2)))
        bits = scramble(state[:, None] + columns * _GOLDEN)
    return dict(zip(_DRAWS, ((bits >> np.uint64(11)) * 2.0**-53).T, strict=True))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def scramble(z: np.ndarray | np.uint64) -> np.ndarray:
    """Return 64-bit counters scrambled by splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def crop_boxes(config: AugmentConfig, draws: dict[str, np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Return random resized crops (left, top, width, height) [B, 4] in pixels for images of `sizes` [B, 2] (h, w).

    Area and log aspect ratio are uniform, as in Szegedy et al. 2015, section 6; a crop that would not fit is shrunk to
    fit, which keeps its aspect ratio.
    """
    height, width = sizes[:, 0].astype(float), sizes[:, 1].astype(float)
    area = height * width * (config.crop_scale + (1 - config.crop_scale) * draws["area"])
    # Around an image that is not square itself, ratios are relative to 1 as in torchvision, unless nothing is cropped.
    limit = math.log(config.crop_ratio) if config.crop_scale < 1 else 0.0
    ratio = np.exp((2 * draws["ratio"] - 1) * limit) if config.crop_scale < 1 else width / height
    crop_width, crop_height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    shrink = np.minimum(1.0, np.minimum(width / crop_width, height / crop_height))
    # Rounding must not make a crop larger than its image: Pillow refuses a box that begins at -1e-14.
    crop_width, crop_height = np.minimum(crop_width * shrink, width), np.minimum(crop_height * shrink, height)
    left, top = draws["left"] * (width - crop_width), draws["top"] * (height - crop_height)
    return np.stack([left, top, crop_width, crop_height], axis=1)


def geometry(
    config: AugmentConfig, draws: dict[str, np.ndarray], boxes: np.ndarray | None, size: tuple[int, int]
) -> np.ndarray:
    """Return the affine maps [B, 2, 3] from output to input coordinates, both in -1..1 (as `affine_grid` wants).

    Args:
        boxes: crops in pixels of an image of `size` (h, w), or None when the images are cropped already.
    """
    flip = np.where(draws["flip"] < config.flip, -1.0, 1.0)
    vertical = np.where(draws["vertical"] < config.vertical_flip, -1.0, 1.0)
    angle = np.deg2rad((2 * draws["angle"] - 1) * config.rotation)
    right, down = ((2 * draws[name] - 1) * 2 * config.shift for name in ("right", "down"))
    scale_x = scale_y = np.ones_like(angle)
    centre_x = centre_y = np.zeros_like(angle)
    if boxes is not None:
        scale_x, scale_y = boxes[:, 2] / size[1], boxes[:, 3] / size[0]
        centre_x = (2 * boxes[:, 0] + boxes[:, 2]) / size[1] - 1
        centre_y = (2 * boxes[:, 1] + boxes[:, 3]) / size[0] - 1
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack(
        [
            np.stack([scale_x * cos * flip, -scale_x * sin * vertical, centre_x + right], axis=1),
            np.stack([scale_y * sin * flip, scale_y * cos * vertical, centre_y + down], axis=1),
        ],
        axis=1,
    )


def augment_batch(
    images: Float[Tensor, "B C H W"] | UInt8[Tensor, "B C H W"],
    config: AugmentConfig,
    draws: dict[str, np.ndarray],
    boxes: np.ndarray | None,
    out_size: int,
) -> Float[Tensor, "B C S S"]:
    """Augment images as drawn; the result has values 0..1.

    Args:
        images: of values 0..1, or uint8.
        boxes: crops to take, in pixels; None when the images are cropped and of `out_size` already.
    """
    size = (images.shape[2], images.shape[3])
    if boxes is not None or config.rotation or config.shift:
        maps = torch.from_numpy(geometry(config, draws, boxes, size)).to(images.device, torch.float32)
        # A crop alone reaches no further than half a pixel out; a mirror shows the edge there too, at a fourth more cost.
        fill = _PADDING[config.fill] if config.rotation or config.shift else "border"
        grid = sampling_grid(maps, out_size)
        images = F.grid_sample(unit_scale(images), grid, padding_mode=fill, align_corners=False)
    else:
        images = flip_images(
            flip_images(images, draws["flip"] < config.flip, 3), draws["vertical"] < config.vertical_flip, 2
        )
    return apply_policy(colour(unit_scale(images), config, draws), config, draws)


def sampling_grid(maps: Float[Tensor, "B 2 3"], side: int) -> Float[Tensor, "B S S 2"]:
    """Return the grid of `affine_grid` without `align_corners`, in half the time: its product is of width three."""
    line = (torch.arange(side, device=maps.device) * 2 + 1) / side - 1
    a, b, c = maps[:, :, :, None, None].unbind(2)  # [B, 2, 1, 1] each
    return (line * a + (line[:, None] * b + c)).movedim(1, 3)


def flip_images(images: Shaped[Tensor, "B C H W"], chosen: np.ndarray, dim: int) -> Shaped[Tensor, "B C H W"]:
    """Flip the chosen images along one dimension."""
    if not chosen.any():
        return images
    where = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    images = images.clone()
    images[where] = images[where].flip(dim)
    return images


def colour(
    images: Float[Tensor, "B C H W"], config: AugmentConfig, draws: dict[str, np.ndarray]
) -> Float[Tensor, "B C H W"]:
    """Jitter brightness, contrast and saturation as torchvision's ColorJitter does (without hue)."""

    def factor(name: str, strength: float) -> Tensor:
        return torch.from_numpy(1 + (2 * draws[name] - 1) * strength).to(images)[:, None, None, None]

    if config.brightness:
        images = (images * factor("bright", config.brightness)).clamp_(0, 1)
    if config.contrast:
        mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
        images = torch.lerp(mean, images, factor("contrast", config.contrast)).clamp_(0, 1)
    if config.saturation and images.shape[1] == 3:
        images = torch.lerp(grey(images), images, factor("saturation", config.saturation)).clamp_(0, 1)
    return images


def grey(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
    """Return luma (ITU-R BT.601), as Pillow's mode L."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114]).to(images).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)
