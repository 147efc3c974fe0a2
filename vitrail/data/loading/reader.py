"""Random access to the images of a dataset, for training and for evaluation, on threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from threadpoolctl import threadpool_limits

from vitrail.data.cache.decoded import DecodedImageCache
from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ImageError
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.crop_decode import BoxSampler, CropReader

R = TypeVar("R")
ReadResult = np.ndarray | ImageError | OSError  # one image, or why it could not be read


@dataclass
class ImageReader:
    """Random access to the images of a dataset, from memory or from files.

    Attributes:
        targets: [N] class index of every image, as the model numbers its classes.
        stored: decoded images uint8 [N, C, H, W], or None to read files.
        is_ready: whether the stored images are the model's input as they are.
        sizes: [N, 2] height and width of every image; needed for training from files.
        fast: whether training may decode and resize faster, and a little differently; see `CropReader`.
        cache: decoded training images on disk.
        dropped: location of each file that failed after the scan → the reason.
        reported: locations that the user was told of.
    """

    dataset: Dataset
    targets: np.ndarray
    preprocess: Preprocess
    stored: np.ndarray | None
    is_ready: bool = False
    workers: int = 0
    sizes: np.ndarray | None = None
    fast: bool = False
    cache: DecodedImageCache | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.num_threads = self.workers or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode", initializer=use_one_thread)

    def submit(self, task: Callable[[range], R], count: int, chunk_size: int) -> list[Future[R]]:
        """Start `task` on the threads for the positions 0 … count - 1 of a batch, `chunk_size` of them at a time.

        One task for each image would cost a tenth of decoding an ImageNet image, and more than decoding a small one.
        """
        return [
            self.pool.submit(task, range(start, min(start + chunk_size, count)))
            for start in range(0, count, chunk_size)
        ]

    def collect(
        self, futures: list[Future[list[ReadResult]]], indices: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the images that were read, each of its own size, and their positions; failed ones go to `dropped`."""
        pixels, positions = [], []
        for position, result in enumerate(result for future in futures for result in future.result()):
            if isinstance(result, np.ndarray):
                pixels.append(result)
                positions.append(position)
            else:
                self.dropped[self.dataset.location(int(indices[position]))] = str(result)
        return pixels, np.asarray(positions, dtype=np.int64)

    @property
    def crop_reader(self) -> CropReader:
        """The reader of training crops from files."""
        preprocess = self.preprocess
        return CropReader(preprocess.image_size, preprocess.interpolation, preprocess.mode, self.fast)

    def read_crop(self, index: int, box_sampler: BoxSampler) -> np.ndarray:
        """Return a crop of one image, uint8 [C, S, S]."""
        crop_reader = self.crop_reader
        if self.cache is None:
            return crop_reader.read(self.dataset, index, box_sampler)
        pixels = self.cache.read(index)
        side = crop_reader.side
        return crop_reader.resize(pixels, box_sampler(pixels.shape[1], pixels.shape[0]), (side, side))

    def require_some(self, read: int, wanted: int) -> None:
        """Raise a ValueError when none of the `wanted` files could be read."""
        if wanted and not read:
            raise ValueError(f"none of {wanted} files can be read any more: {next(iter(self.dropped.items()))}")

    def read_whole(self, index: int) -> np.ndarray:
        """Return one image as `Preprocess.apply` does: [C, S, S], or [C, H, W] with preprocessing `aspect`."""
        if self.stored is None:
            return self.preprocess.apply(self.dataset.read(index, self.preprocess.mode))
        pixels = self.stored[index]
        if self.is_ready:
            return pixels
        return self.preprocess.apply(PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def attempt(read: Callable[[int], np.ndarray], position: int) -> ReadResult:
    """Return the image that `read` gives for a position of a batch, or the error that it raises."""
    try:
        return read(position)
    except (ImageError, OSError) as error:
        return error


def use_one_thread() -> None:
    """Limit PyTorch to one thread within this one: OpenMP's threads wait for each other when all cores are busy."""
    torch.get_num_threads()  # its first call in a thread would reset the limit
    threadpool_limits(1, user_api="openmp")
