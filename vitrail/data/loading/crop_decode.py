"""A box of an image brought to the model's size: what training reads, where `preprocess.py` is what evaluation reads."""

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
from vitrail.data.images.jpeg import FACTORS, START, Jpeg, decode_jpeg, jpeg_header
from vitrail.data.images.preprocess import INTERPOLATIONS

if TYPE_CHECKING:
    from vitrail.data.datasets.base import Dataset

# How far the filter of each interpolation reaches to either side, in pixels of the result (Pillow's Resample.c).
_REACH = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0, "box": 0.5, "hamming": 1.0, "nearest": 0.0}
_SIMD = ("bilinear", "bicubic")  # of these PyTorch has its own fast code for three channels of uint8


class Box(NamedTuple):
    """A rectangle in pixels; its sides need not lie between pixels."""

    left: float
    top: float
    width: float
    height: float

    def scaled(self, x: float, y: float) -> Box:
        """Return the same rectangle of an image that is so many times as wide and as high."""
        return Box(self.left * x, self.top * y, self.width * x, self.height * y)


BoxSampler = Callable[[int, int], Box]  # from an image's width and height


@dataclass(frozen=True)
class CropReader:
    """How training takes a box out of an image.

    Attributes:
        side: of the square that the box becomes, pixels.
        fast: a JPEG is decoded 2, 4 or 8 times smaller where the box stays as large as the square, and PyTorch resizes:
            pixels differ a little from Pillow's resizing of the whole image.
    """

    side: int
    interpolation: str
    mode: Literal["RGB", "L"]
    fast: bool = False

    def read(self, dataset: Dataset, index: int, box_sampler: BoxSampler) -> np.ndarray:
        """Return a box of one of a source's images as uint8 [C, S, S]; errors are those of `Source.read`."""
        return self.resize(*self.region(dataset, index, box_sampler), (self.side, self.side))

    def region(self, dataset: Dataset, index: int, box_sampler: BoxSampler) -> tuple[np.ndarray, Box]:
        """Decode what holds a box: uint8 [H, W] or [H, W, 3], good until the thread's next image, and the box in it."""
        data = jpeg_of(dataset, index)
        header = jpeg_header(data)
        if header is not None and header.width * header.height <= dataset.limit_pixels:
            width, height = header.turned_size
            if header.space == "Gray" or self.mode == "RGB":
                box = box_sampler(width, height)
                factor = self.factor(box)
                pixels = decode_jpeg(data, header, self.mode, factor)
                if pixels is not None:
                    return pixels, box if factor == 1 else shrunk(box, factor, header, pixels.shape)
        image = dataset.read(index, self.mode)
        return np.asarray(image), box_sampler(*image.size)

    def whole(self, dataset: Dataset, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image [H, W] or [H, W, 3], its short side brought to `side`, or as it is where that is shorter.

        Also returns the height and width that its file has.
        """
        size = np.zeros(2, dtype=np.int64)

        def choose(width: int, height: int) -> Box:
            size[:] = height, width
            return Box(0.0, 0.0, width, height)

        pixels, box = self.region(dataset, index, choose)
        high, wide = stored_sizes_of(size[None], self.side)[0].tolist()
        listed = (int(size[0]), int(size[1]))
        if pixels.shape[:2] == (high, wide):
            return np.array(pixels, order="C"), listed  # a copy: the thread's next image takes the memory
        resized = self.resize(pixels, box, (wide, high))
        return (np.ascontiguousarray(resized.transpose(1, 2, 0)) if len(resized) == 3 else resized[0]), listed

    def factor(self, box: Box) -> int:
        """Return how many times smaller a JPEG may be decoded: the box must not become smaller than its square."""
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
    """Return an image's file if it is a JPEG that memory may hold; else nothing."""
    if isinstance(dataset, ArrayDataset):
        return b""
    if not isinstance(dataset, FileDataset):
        return dataset.encoded(index)
    with open(dataset.location(index), "rb") as file:
        start = file.read(len(START))
        if start != START or os.fstat(file.fileno()).st_size > WHOLE_BYTES:
            return b""
        return start + file.read()


def shrunk(box: Box, factor: int, header: Jpeg, shape: tuple[int, ...]) -> Box:
    """Return where a box lies in a JPEG that was decoded smaller.

    There a pixel is `factor` pixels wide, also the last one, which reaches beyond the image; turned, it may come first.
    """
    width, height = header.turned_size
    before_x = shape[1] - width / factor if header.mirrored else 0.0
    before_y = shape[0] - height / factor if header.upside_down else 0.0
    left, top, box_width, box_height = box.scaled(1 / factor, 1 / factor)
    return Box(left + before_x, top + before_y, box_width, box_height)


def by_pillow(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize by Pillow, which is given no more of the image than its filter reaches.

    From the whole image it may take its two passes in the other order, and then rounds between them otherwise.
    """
    high, wide = pixels.shape[:2]
    # Pillow rounds to float32. Done before the shift, the corners lie where they would in the whole image.
    left, right = (float(np.float32(x)) for x in (max(0.0, box.left), min(wide, box.left + box.width)))
    top, bottom = (float(np.float32(y)) for y in (max(0.0, box.top), min(high, box.top + box.height)))
    x0, x1 = _reached(left, right, wide, size[0], interpolation)
    y0, y1 = _reached(top, bottom, high, size[1], interpolation)
    part = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    corners = (left - x0, top - y0, right - x0, bottom - y0)
    resized = part.resize(size, INTERPOLATIONS[interpolation], box=corners)
    return np.stack([np.asarray(band) for band in resized.split()])


def _reached(start: float, end: float, limit: int, result: int, interpolation: str) -> tuple[int, int]:
    reach = _REACH[interpolation] * max(1.0, (end - start) / result) + 1
    return max(0, math.floor(start - reach)), min(limit, math.ceil(end + reach))


def by_torch(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize a box [H, W, 3], to whole pixels, by PyTorch's vector code for antialiased uint8.

    It is 4 to 9 times faster than Pillow's and differs by a level or two here and there, since its weights have 16 bits.
    """
    import torch
    import torch.nn.functional as F

    left, top = min(round(box.left), pixels.shape[1] - 1), min(round(box.top), pixels.shape[0] - 1)
    right, bottom = max(left + 1, round(box.left + box.width)), max(top + 1, round(box.top + box.height))
    part = torch.from_numpy(np.array(pixels[top:bottom, left:right], order="C")).permute(2, 0, 1)[None]
    if (part.shape[3], part.shape[2]) == size:
        return part[0].contiguous().numpy()
    return F.interpolate(part, size[::-1], mode=interpolation, antialias=True)[0].numpy()
