"""Decode a box of an image and resize it to the model's input, for training; `preprocess.py` does so for evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image

from vitrail.data.cache.decoded import stored_sizes_of
from vitrail.data.datasets.base import ArrayDataset, FileDataset
from vitrail.data.images.decode import WHOLE_BYTES
from vitrail.data.images.jpeg import FACTORS, START, JpegHeader, decode_jpeg, jpeg_header
from vitrail.data.images.preprocess import INTERPOLATIONS

if TYPE_CHECKING:
    from vitrail.data.datasets.base import Dataset

# Radius of each interpolation's filter, in pixels of the result (Pillow's Resample.c).
_RADIUS = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0, "box": 0.5, "hamming": 1.0, "nearest": 0.0}
_SIMD = ("bilinear", "bicubic")  # for these PyTorch has fast code for three channels of uint8


class Box(NamedTuple):
    """A rectangle in pixels, whose sides need not be whole numbers."""

    left: float
    top: float
    width: float
    height: float

    def scaled(self, x: float, y: float) -> Box:
        """Return the same rectangle in an image that is `x` times as wide and `y` times as high."""
        return Box(self.left * x, self.top * y, self.width * x, self.height * y)


BoxSampler = Callable[[int, int], Box]  # returns a box for an image's width and height


@dataclass(frozen=True)
class CropReader:
    """Reads a box of an image for training.

    Attributes:
        side: of the square that the box is resized to, pixels.
        fast: a JPEG is decoded 2, 4 or 8 times smaller where the box stays as large as the square, and PyTorch resizes:
            pixels differ a little from Pillow's resizing of the whole image.
    """

    side: int
    interpolation: str
    mode: Literal["RGB", "L"]
    fast: bool = False

    def read(self, dataset: Dataset, index: int, box_sampler: BoxSampler) -> np.ndarray:
        """Return a box of one image of a dataset as uint8 [C, S, S]; errors are those of `Dataset.read`."""
        return self.resize(*self.region(dataset, index, box_sampler), (self.side, self.side))

    def region(self, dataset: Dataset, index: int, box_sampler: BoxSampler) -> tuple[np.ndarray, Box]:
        """Return pixels, uint8 [H, W] or [H, W, 3], valid until the thread's next image, and the box in them."""
        data = jpeg_of(dataset, index)
        header = jpeg_header(data)
        if header is not None and header.width * header.height <= dataset.limit_pixels:
            width, height = header.oriented_size
            if header.colour_space == "Gray" or self.mode == "RGB":
                box = box_sampler(width, height)
                factor = self.factor(box)
                pixels = decode_jpeg(data, header, self.mode, factor)
                if pixels is not None:
                    return pixels, box if factor == 1 else shrunk(box, factor, header, pixels.shape)
        image = dataset.read(index, self.mode)
        return np.asarray(image), box_sampler(*image.size)

    def whole(self, dataset: Dataset, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image [H, W] or [H, W, 3] whose short side is resized to `side`, or as it is where that is shorter.

        Also returns the height and width in its file.
        """
        size = np.zeros(2, dtype=np.int64)

        def whole_box(width: int, height: int) -> Box:
            size[:] = height, width
            return Box(0.0, 0.0, width, height)

        pixels, box = self.region(dataset, index, whole_box)
        high, wide = stored_sizes_of(size[None], self.side)[0].tolist()
        file_size = (int(size[0]), int(size[1]))
        if pixels.shape[:2] == (high, wide):
            return np.array(pixels, order="C"), file_size  # a copy: the thread's next image takes the memory
        resized = self.resize(pixels, box, (wide, high))
        return (np.ascontiguousarray(resized.transpose(1, 2, 0)) if len(resized) == 3 else resized[0]), file_size

    def factor(self, box: Box) -> int:
        """Return by what a JPEG's sides may be divided in decoding: the box must not become smaller than its square."""
        if self.fast:
            for factor in FACTORS:
                if min(box.width, box.height) >= factor * self.side:
                    return factor
        return 1

    def resize(self, pixels: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Resize a box of pixels [H, W] or [H, W, 3] to (width, height); returns uint8 [C, height, width]."""
        if self.fast and pixels.ndim == 3 and self.interpolation in _SIMD:
            return by_torch(pixels, box, size, self.interpolation)
        return by_pillow(pixels, box, size, self.interpolation)


def jpeg_of(dataset: Dataset, index: int) -> bytes:
    """Return the bytes of an image's file if it is a JPEG that fits in memory; else none."""
    if isinstance(dataset, ArrayDataset):
        return b""
    if not isinstance(dataset, FileDataset):
        return dataset.encoded(index)
    with open(dataset.location(index), "rb") as file:
        start = file.read(len(START))
        if start != START or os.fstat(file.fileno()).st_size > WHOLE_BYTES:
            return b""
        return start + file.read()


def shrunk(box: Box, factor: int, header: JpegHeader, shape: tuple[int, ...]) -> Box:
    """Return a box in the coordinates of a JPEG that was decoded smaller.

    A pixel there is `factor` pixels wide, also the last one, which reaches beyond the image; rotated, it may be first.
    """
    width, height = header.oriented_size
    before_x = shape[1] - width / factor if header.mirrored else 0.0
    before_y = shape[0] - height / factor if header.upside_down else 0.0
    left, top, box_width, box_height = box.scaled(1 / factor, 1 / factor)
    return Box(left + before_x, top + before_y, box_width, box_height)


def by_pillow(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize a box by Pillow, which gets no more of the image than its filter reaches.

    With the whole image Pillow might do its two passes in the other order, and round differently between them.
    """
    high, wide = pixels.shape[:2]
    # Pillow rounds to float32. Done before the shift, the corners lie where they would in the whole image.
    left, right = (float(np.float32(x)) for x in (max(0.0, box.left), min(wide, box.left + box.width)))
    top, bottom = (float(np.float32(y)) for y in (max(0.0, box.top), min(high, box.top + box.height)))
    x0, x1 = _filter_range(left, right, wide, size[0], interpolation)
    y0, y1 = _filter_range(top, bottom, high, size[1], interpolation)
    crop = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    corners = (left - x0, top - y0, right - x0, bottom - y0)
    resized = crop.resize(size, INTERPOLATIONS[interpolation], box=corners)
    return np.stack([np.asarray(band) for band in resized.split()])


def _filter_range(start: float, end: float, limit: int, result: int, interpolation: str) -> tuple[int, int]:
    """Return the first and the end of the pixels along an axis that the filter reaches from `start` to `end`."""
    radius = _RADIUS[interpolation] * max(1.0, (end - start) / result) + 1
    return max(0, math.floor(start - radius)), min(limit, math.ceil(end + radius))


def by_torch(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize a box [H, W, 3], rounded to whole pixels, by PyTorch's vector code for antialiased uint8.

    It is 4 to 9 times faster than Pillow's and differs by a level or two in places, since its weights have 16 bits.
    """
    import torch
    import torch.nn.functional as F

    left, top = min(round(box.left), pixels.shape[1] - 1), min(round(box.top), pixels.shape[0] - 1)
    right, bottom = max(left + 1, round(box.left + box.width)), max(top + 1, round(box.top + box.height))
    crop = torch.from_numpy(np.array(pixels[top:bottom, left:right], order="C")).permute(2, 0, 1)[None]
    if (crop.shape[3], crop.shape[2]) == size:
        return crop[0].contiguous().numpy()
    return F.interpolate(crop, size[::-1], mode=interpolation, antialias=True)[0].numpy()
