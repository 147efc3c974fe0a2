"""From a picture of any size to the model's input: one function for training's judgement, predict and serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image

from vitrail.config import PreprocessConfig, RunConfig
from vitrail.settings import setting

if TYPE_CHECKING:
    import torch

INTERPOLATIONS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}


_PIXELS_LIMIT = 30_000_000  # of a resized picture before its centre is cut out


@dataclass(frozen=True)
class Preprocess:
    """The exact preprocessing of a model, as its file's header keeps it.

    Decode and EXIF rotation come before (`data/decode.py`); resizing is Pillow's, which always antialiases.
    """

    image_size: int = setting(224, "side of the result, pixels")
    channels: int = setting(3, "3: colour, 1: grey")
    resize: str = setting(
        "crop", "crop: shortest side, then the centre; squash: both sides; aspect: whole, about S² pixels"
    )
    crop_fraction: float = setting(0.9, "share of the resized short side that the centre crop keeps")
    interpolation: str = setting("bicubic", "Pillow's filter")
    mean: tuple[float, ...] = setting((0.5, 0.5, 0.5), "subtracted from pixels in 0..1, one per channel")
    std: tuple[float, ...] = setting((0.5, 0.5, 0.5), "divides after the mean, one per channel")
    multiple: int = setting(1, "with aspect, sides are multiples of this: the patch, so that none is padded")

    def __post_init__(self) -> None:
        PreprocessConfig(self.resize, self.crop_fraction, self.interpolation, self.mean, self.std)
        if len(self.mean) != self.channels or self.image_size < 1 or self.multiple < 1:
            raise ValueError(
                f"preprocessing: image_size {self.image_size} and multiple {self.multiple} must be 1 or more, and mean "
                f"{self.mean} needs {self.channels} values"
            )

    @property
    def mode(self) -> Literal["RGB", "L"]:
        """Pillow's name of the pixel format."""
        return "RGB" if self.channels == 3 else "L"

    def apply(self, picture: PIL.Image.Image) -> np.ndarray:
        """Resize and crop a picture of mode `self.mode`; returns uint8 [C, S, S], with `aspect` [C, H, W]."""
        size, filter = self.image_size, INTERPOLATIONS[self.interpolation]
        width, height = picture.size
        if self.resize == "squash":
            if (width, height) != (size, size):
                picture = picture.resize((size, size), filter)
            return to_array(picture)
        if self.resize == "aspect":
            target = self.aspect_size(width, height)
            return to_array(picture if picture.size == target else picture.resize(target, filter))
        # Sides and offsets are rounded as in torchvision's Resize and CenterCrop, to the pixel.
        short = max(size, int(size / self.crop_fraction))
        if short * short * max(width, height) > _PIXELS_LIMIT * min(width, height):
            # A strip a thousand times longer than wide would be resized to gigabytes: resample only what is kept.
            half = min(width, height) * size / short / 2
            box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
            return to_array(picture.resize((size, size), filter, box=box))
        if min(width, height) != short:
            longer = int(short * max(width, height) / min(width, height))
            picture = picture.resize((short, longer) if width <= height else (longer, short), filter)
        left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
        return to_array(picture.crop((left, top, left + size, top + size)))

    def aspect_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that keep a picture's aspect ratio at about image_size² pixels (Dehghani et al.
        2023, NaViT, section 2): to the nearest multiple, and at most twice that area for a strip."""
        scale = self.image_size / (width * height) ** 0.5
        short = max(1, round(min(width, height) * scale / self.multiple)) * self.multiple
        longest = max(1, 2 * self.image_size**2 // (short * self.multiple))
        long = min(longest, max(1, round(max(width, height) * scale / self.multiple))) * self.multiple
        return (short, long) if width <= height else (long, short)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 or 0..1 float pictures [B, C, H, W] into the model's float input."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        values = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        return (values - mean).div_(std)


def preprocess_of(config: RunConfig) -> Preprocess:
    """Return the preprocessing that a run's configuration means."""
    given = config.preprocess
    return Preprocess(
        image_size=config.model.image_size,
        channels=config.model.in_channels,
        resize=given.resize,
        crop_fraction=given.crop_fraction,
        interpolation=given.interpolation,
        mean=given.mean,
        std=given.std,
        multiple=config.model.patch_size if given.resize == "aspect" else 1,
    )


def crop_fraction_of(size: int, side: int) -> float:
    """Return the `crop_fraction` with which the shortest side becomes exactly `side` before `size` is cut out.

    Raises:
        ValueError: the picture would be smaller than what is cut out of it.
    """
    if side < size:
        raise ValueError(f"a picture resized to {side} px is smaller than the {size} px that are cut out of it")
    fraction = size / side
    # The half keeps rounding from taking a pixel away, as in 224 / (224 / 232).
    return fraction if int(size / fraction) == side else size / (side + 0.5)


def to_array(picture: PIL.Image.Image) -> np.ndarray:
    """Return a picture's pixels as uint8 [C, H, W]."""
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
