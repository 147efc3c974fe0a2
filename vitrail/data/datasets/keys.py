"""What each image of a dataset is known by, so that what is cached of it is found again, and not when it has changed."""

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
    """Return what each image is known by [N] V16: its path and its identity in the source, else its pixels."""

    def key(index: int) -> bytes:
        known = dataset.identity(index) or _content(dataset, index, mode)
        text = f"{dataset.paths[index]}\0".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text + known, digest_size=KEY.itemsize).digest()

    return np.frombuffer(b"".join(ordered_map(key, map(int, indices), workers)), dtype=KEY)


def cache_name(dataset: Dataset) -> str:
    """Return the name under which what is found out about a dataset's images is cached: the same for all commands.

    Files are known by their folder, however the user wrote it.
    """
    return os.path.abspath(dataset.root) if isinstance(dataset, FileDataset) else dataset.name


def _content(dataset: Dataset, index: int, mode: Literal["RGB", "L"]) -> bytes:
    """Return what an image without an identity is known by: its pixels, or nothing known when it is broken."""
    try:
        pixels = np.asarray(dataset.read(index, mode))
    except (ImageError, OSError):
        return os.urandom(KEY.itemsize)
    return f"{pixels.shape}".encode() + pixels.tobytes()
