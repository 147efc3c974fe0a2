"""Resize, crop and normalise images to the model's input: one function for evaluation, predict and serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import PIL.Image

from vitrail.config import PreprocessConfig, RunConfig
from vitrail.config_schema import setting

if TYPE_CHECKING:
    import torch

INTERPOLATIONS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
    "box": PIL.Image.Resampling.BOX,
    "hamming": PIL.Image.Resampling.HAMMING,
    "nearest": PIL.Image.Resampling.NEAREST,
}

_PIXELS_LIMIT = 30_000_000  # of a resized image before its centre is cut out


@dataclass(frozen=True)
class Preprocess(PreprocessConfig):
    """The exact preprocessing of a model, as the header of its model file records it: a run's settings and the model's input.

    Decoding and EXIF rotation come before (`data/images/decode.py`); resizing is Pillow's, which always antialiases.
    """

    image_size: int = setting(224, "side of the result, pixels")
    channels: int = setting(3, "3: colour, 1: grey")
    multiple: int = setting(1, "with aspect, sides are multiples of this: the patch, so that none is padded")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != self.channels or self.image_size < 1 or self.multiple < 1:
            raise ValueError(
                f"preprocessing: image_size {self.image_size} and multiple {self.multiple} must be 1 or more, and mean "
                f"{self.mean} needs {self.channels} values"
            )

    @property
    def mode(self) -> Literal["RGB", "L"]:
        """Pillow's name of the pixel format."""
        return "RGB" if self.channels == 3 else "L"

    def apply(self, image: PIL.Image.Image) -> np.ndarray:
        """Resize and crop an image of mode `self.mode`; returns uint8 [C, S, S], with `aspect` [C, H, W].

        With resampler `fractions` it is float32 in 0..1, or a little outside where a bicubic filter overshoots.
        """
        if self.resampler != "fractions":
            return to_array(self.resized(image))
        bands = [self.resized(band.convert("F")) for band in image.split()]
        return np.stack([np.asarray(band) for band in bands]) / np.float32(255)

    def resized(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return an image resized and cropped to the model's input size; any mode that Pillow resizes."""
        size = self.image_size
        width, height = image.size
        if self.resize == "aspect":
            target = self.aspect_size(width, height)
            return image if image.size == target else self.resample(image, target)
        # Sides are rounded as in torchvision's Resize.
        short = size if self.resize == "squash" else max(size, int(size / self.crop_fraction))
        if self.resize in ("squash", "squash_crop"):
            image = image if image.size == (short, short) else self.resample(image, (short, short))
        elif short * short * max(width, height) > _PIXELS_LIMIT * min(width, height):
            # A strip a thousand times longer than wide would be resized to gigabytes: resample only the centre.
            half = min(width, height) * size / short / 2
            box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
            return image.resize((size, size), INTERPOLATIONS[self.interpolation], box=box)
        elif min(width, height) != short:
            longer = int(short * max(width, height) / min(width, height))
            image = self.resample(image, (short, longer) if width <= height else (longer, short))
        left, top = self.offset(image.width - size), self.offset(image.height - size)
        if image.size == (size, size):
            return image
        return image.crop((left, top, left + size, top + size))

    def resample(self, image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
        """Return an image resized to (width, height)."""
        if self.resampler != "torchvision":
            return image.resize(size, INTERPOLATIONS[self.interpolation])
        import torch
        from torchvision.transforms.v2 import InterpolationMode, functional

        mode = InterpolationMode[self.interpolation.upper()]
        pixels = functional.resize(torch.from_numpy(to_array(image).copy()), [size[1], size[0]], mode, antialias=True)
        return PIL.Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())

    def offset(self, spare: int) -> int:
        """Return how many of the spare pixels along a side a centre crop leaves out before it begins."""
        return spare // 2 if self.crop_offset == "down" else round(spare / 2)  # half to even, as torchvision's

    def aspect_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that keep an image's aspect ratio at about image_size² pixels (Dehghani et al.
        2023, NaViT, section 2): to the nearest multiple, and at most twice that area for a strip."""
        scale = self.image_size / (width * height) ** 0.5
        short = max(1, round(min(width, height) * scale / self.multiple)) * self.multiple
        longest = max(1, 2 * self.image_size**2 // (short * self.multiple))
        long = min(longest, max(1, round(max(width, height) * scale / self.multiple))) * self.multiple
        return (short, long) if width <= height else (long, short)

    def normalise(self, pixels: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return uint8 or 0..1 float images [B, C, H, W] as the model's float input, in `out` where it is given."""
        import torch

        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return torch.sub(unit_scale(pixels), mean, out=out).div_(std)


def preprocess_from_config(config: RunConfig) -> Preprocess:
    """Return the preprocessing that a run's configuration describes."""
    return Preprocess(
        **vars(config.preprocess),
        image_size=config.model.image_size,
        channels=config.model.in_channels,
        multiple=config.model.patch_size if config.preprocess.resize == "aspect" else 1,
    )


def crop_fraction_of(size: int, side: int) -> float:
    """Return the `crop_fraction` with which the shortest side becomes exactly `side` before `size` is cut out.

    Raises:
        ValueError: the image would be smaller than what is cut out of it.
    """
    if side < size:
        raise ValueError(f"an image resized to {side} px is smaller than the {size} px that are cut out of it")
    fraction = size / side
    # The half keeps rounding from taking a pixel away, as in 224 / (224 / 232).
    return fraction if int(size / fraction) == side else size / (side + 0.5)


def unit_scale(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels as float32 in 0..1: uint8 divided by 255, floats as they are."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(255)


def to_array(image: PIL.Image.Image) -> np.ndarray:
    """Return an image's pixels as uint8 [C, H, W]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
