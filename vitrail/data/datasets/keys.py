"""Cache keys of images: equal while an image is unchanged, so that what is cached of it is found again."""

from __future__ import annotations

import hashlib
import os
from typing import Literal

import numpy as np

from vitrail.data.cache.rows import KEY
from vitrail.data.datasets.base import Dataset, FileDataset
from vitrail.data.images.decode import ImageError
from vitrail.threads import ordered_map


def image_keys(dataset: Dataset, indices: np.ndarray, mode: Literal["RGB", "L"], workers: int = 0) -> np.ndarray:
    """Return the cache key of each image [N] V16: a hash of its path and of its identity or, without one, its pixels."""

    def key(index: int) -> bytes:
        identity = dataset.identity(index) or _content(dataset, index, mode)
        text = f"{dataset.paths[index]}\0".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text + identity, digest_size=KEY.itemsize).digest()

    return np.frombuffer(b"".join(ordered_map(key, map(int, indices), workers)), dtype=KEY)


def cache_name(dataset: Dataset) -> str:
    """Return the name under which what is found out about a dataset's images is cached: the same for all commands.

    Files are known by their folder, however the user wrote it.
    """
    return os.path.abspath(dataset.root) if isinstance(dataset, FileDataset) else dataset.name


def _content(dataset: Dataset, index: int, mode: Literal["RGB", "L"]) -> bytes:
    """Return the pixels of an image without an identity; random bytes when it is broken, so that nothing is found."""
    try:
        pixels = np.asarray(dataset.read(index, mode))
    except (ImageError, OSError):
        return os.urandom(KEY.itemsize)
    return f"{pixels.shape}".encode() + pixels.tobytes()
