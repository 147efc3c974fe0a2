"""Decoded training images on disk, mapped into memory: from the second epoch on nothing is decoded.

An image is kept whole, its short side brought to a stated length, as uint8. Crops are taken from that form in every
epoch, the first included, so that a batch is the same whether an image was in the cache or not.

The file has a place for every image. A place counts when its checksum holds, which each process looks at once: so a
process that is killed, a full disk or two processes that write the same image can spoil nothing.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import weakref
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL
import simplejpeg

from vitrail.data.cache.rows import rows_folder
from vitrail.files import filled_folder

FORMAT = 1  # raise it when the same image would be kept otherwise
_SPARE_BYTES = 2**28  # left on the disk: a checkpoint may have to go there
_HEAD = 8  # bytes before each image: whether it is there, and its checksum


class DecodedImageCache:
    """The kept images of a source; safe for threads and for processes of one machine.

    Attributes:
        num_stored: how many images have a place, of those that were asked for.
        num_bytes: what they take when all are there.
        full: why nothing more is written, or an empty string.
    """

    def __init__(
        self,
        source: str,
        indices: np.ndarray,
        sizes: np.ndarray,
        *,
        side: int,
        channels: int,
        limit_bytes: int,
        decode: Callable[[int], tuple[np.ndarray, tuple[int, int]]],
        depends_on: Callable[[np.ndarray], Iterable[object]],
    ) -> None:
        """Open the cache of the images `indices`, or make an empty one.

        Args:
            source: name of the dataset.
            sizes: [N, 2] height and width of every image of the dataset.
            side: length of the short side in pixels; smaller images stay as they are.
            channels: 3 for images [H, W, 3], 1 for images [H, W].
            limit_bytes: places are given in the order of `indices` while they fit.
            decode: returns an image, its short side brought to `side`, and height and width that its file has now.
            depends_on: returns, for the images that get a place, all that their pixels depend on.

        Raises:
            OSError: the cache folder cannot be written.
        """
        self.channels, self.sizes, self.full, self._decode = channels, sizes, "", decode
        self.stored_sizes = stored_sizes_of(sizes, side)
        ends = np.cumsum(_HEAD + self.stored_sizes[indices].prod(axis=1) * channels)
        self.num_stored = int(np.searchsorted(ends, limit_bytes, side="right"))
        self.num_bytes = int(ends[self.num_stored - 1]) if self.num_stored else 0
        kept = indices[: self.num_stored]
        self.starts = np.full(len(sizes), -1, dtype=np.int64)
        self.starts[kept] = np.concatenate([[0], ends[: self.num_stored - 1]]) if self.num_stored else 0
        layout = hashlib.blake2b(self.stored_sizes[kept].tobytes()).hexdigest()
        what = (FORMAT, side, channels, PIL.__version__, simplejpeg.__version__, layout, *depends_on(kept))
        self.folder = filled_folder(rows_folder("images", source, what), self._make)
        self._file = os.open(self.folder / "pixels", os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        # A file of no bytes cannot be mapped.
        mapped = mmap.mmap(self._file, self.num_bytes, access=mmap.ACCESS_READ) if self.num_bytes else b""
        self._map = np.frombuffer(mapped, np.uint8)
        self._checked = np.zeros(len(sizes), dtype=bool)

    def _make(self, folder: Path) -> None:
        with open(folder / "pixels", "wb") as file:
            file.truncate(self.num_bytes)  # takes no space before it is written

    def read(self, index: int) -> np.ndarray:
        """Return an image in its kept form [H, W] or [H, W, 3]; it is decoded and kept when it was not yet.

        Raises:
            ImageError, OSError: the image must be decoded, and cannot be.
        """
        start = int(self.starts[index])
        if start < 0:
            return self._decode(index)[0]
        high, wide = self.stored_sizes[index].tolist()
        shape = (high, wide, 3) if self.channels == 3 else (high, wide)
        pixels = self._map[start + _HEAD : start + _HEAD + math.prod(shape)]
        if self._checked[index] or self._holds(start, pixels):
            self._checked[index] = True
            return pixels.reshape(shape)
        pixels, size = self._decode(index)
        if size == tuple(self.sizes[index].tolist()):  # else the file was replaced since it was listed
            self._write(start, pixels)
        return pixels

    def _holds(self, start: int, pixels: np.ndarray) -> bool:
        there, checksum = self._map[start : start + _HEAD].view(np.uint32).tolist()
        return there == 1 and checksum == zlib.crc32(pixels.data)

    def _write(self, start: int, pixels: np.ndarray) -> None:
        """Keep an image. By a call and not through the map, where a full disk would be a signal that ends the process."""
        if self.full:
            return
        head = np.asarray([1, zlib.crc32(pixels.data)], dtype=np.uint32).tobytes()
        try:
            left = os.fstatvfs(self._file)
            if left.f_bavail * left.f_frsize < _SPARE_BYTES:
                self.full = f"{self.folder}: less than {_SPARE_BYTES // 2**20} MiB are left on its disk"
                return
            for place, content in ((start + _HEAD, pixels.data.cast("B")), (start, head)):
                while len(content):
                    written = os.pwrite(self._file, content, place)
                    place, content = place + written, content[written:]
        except OSError as error:
            self.full = f"{self.folder}: {error.strerror}"


def stored_sizes_of(sizes: np.ndarray, side: int) -> np.ndarray:
    """Return the heights and widths [N, 2] in which images are kept: the short side is `side`, or its own where shorter."""
    scale = np.minimum(1.0, side / np.maximum(sizes.min(axis=1, keepdims=True), 1))
    return np.maximum(1, np.round(sizes * scale)).astype(np.int64)
