"""What the look at every image has found, kept on disk: unchanged files need not be decoded to be looked at again."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import PIL

from vitrail.data.cache.rows import RowCache, rows_folder

THUMBNAIL = 32  # side of the grey copies, pixels

FORMAT = 1  # raise it when a look finds something else in the same file


class CachedScans(NamedTuple):
    """What is known of some images: which [N], height and width [N, 2], grey copies [N, 32, 32], hashes of pixels [N]."""

    found: np.ndarray
    sizes: np.ndarray
    thumbnails: np.ndarray
    digests: np.ndarray


class ScanCache:
    """The looks at a source's whole images; a file with a fault is never kept, and so named each time."""

    def __init__(self, source: str, keys: np.ndarray, mode: Literal["RGB", "L"], *, limit_pixels: int) -> None:
        folder = rows_folder("looks", source, (FORMAT, PIL.__version__, mode, limit_pixels))
        self.rows = RowCache(folder, THUMBNAIL**2 + 16, np.uint8)
        self.keys = keys

    def read(self) -> CachedScans:
        """Return what is known of the source's images."""
        rows, found = self.rows.read(self.keys)
        tail = np.ascontiguousarray(rows[:, THUMBNAIL**2 :])
        sizes, digests = tail[:, :8].copy().view(np.int32), tail[:, 8:].copy().view(np.uint64)[:, 0]
        return CachedScans(found, sizes, rows[:, : THUMBNAIL**2].reshape(-1, THUMBNAIL, THUMBNAIL), digests)

    def add(self, indices: np.ndarray, sizes: np.ndarray, thumbnails: np.ndarray, digests: np.ndarray) -> None:
        """Keep looks at the images `indices`; a cache that cannot be written is done without."""
        parts = (thumbnails.reshape(-1, THUMBNAIL**2), sizes.view(np.uint8), digests[:, None].view(np.uint8))
        try:
            self.rows.add(self.keys[indices], np.concatenate(parts, axis=1))
        except OSError:
            return
