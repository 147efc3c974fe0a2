"""A cache of decoded training images on disk, mapped into memory: from the second epoch on nothing is decoded.

An image is stored whole, its short side resized to a given length, as uint8. Crops are taken from that form in every
epoch, the first included, so that a batch is the same whether an image was in the cache or not.

The file has a slot for every image. A slot is valid when its checksum matches, which each process verifies once: so a
process that is killed, a full disk or two processes that write the same image do no harm.
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

FORMAT = 1  # raise it when the same image would be stored differently
_SPARE_BYTES = 2**28  # left free on the disk, which a checkpoint may need
_HEAD = 8  # bytes before each image: a flag that it is stored, and its checksum


class DecodedImageCache:
    """The decoded images of a dataset; safe for threads and for processes of one machine.

    Attributes:
        num_stored: how many of the requested images have a slot.
        num_bytes: size of all slots.
        full: why nothing more is written, or an empty string.
    """

    def __init__(
        self,
        dataset_name: str,
        indices: np.ndarray,
        sizes: np.ndarray,
        *,
        side: int,
        channels: int,
        limit_bytes: int,
        decode: Callable[[int], tuple[np.ndarray, tuple[int, int]]],
        depends_on: Callable[[np.ndarray], Iterable[object]],
    ) -> None:
        """Open the cache of the images `indices`, or create an empty one.

        Args:
            dataset_name: its name.
            sizes: [N, 2] height and width of every image of the dataset.
            side: length of the short side in pixels; smaller images stay as they are.
            channels: 3 for images [H, W, 3], 1 for images [H, W].
            limit_bytes: slots are assigned in the order of `indices` while they fit.
            decode: returns an image, its short side resized to `side`, and the height and width of its file.
            depends_on: returns, for the images that get a slot, all values that their pixels depend on.

        Raises:
            OSError: the cache folder cannot be written.
        """
        self.channels, self.sizes, self.full, self._decode = channels, sizes, "", decode
        self.stored_sizes = stored_sizes_of(sizes, side)
        ends = np.cumsum(_HEAD + self.stored_sizes[indices].prod(axis=1) * channels)
        self.num_stored = int(np.searchsorted(ends, limit_bytes, side="right"))
        self.num_bytes = int(ends[self.num_stored - 1]) if self.num_stored else 0
        stored = indices[: self.num_stored]
        self.starts = np.full(len(sizes), -1, dtype=np.int64)
        self.starts[stored] = np.concatenate([[0], ends[: self.num_stored - 1]]) if self.num_stored else 0
        layout = hashlib.blake2b(self.stored_sizes[stored].tobytes()).hexdigest()
        key = (FORMAT, side, channels, PIL.__version__, simplejpeg.__version__, layout, *depends_on(stored))
        self.folder = filled_folder(rows_folder("images", dataset_name, key), self._create_file)
        self._file = os.open(self.folder / "pixels", os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        # A file of no bytes cannot be mapped.
        mapped = mmap.mmap(self._file, self.num_bytes, access=mmap.ACCESS_READ) if self.num_bytes else b""
        self._map = np.frombuffer(mapped, np.uint8)
        self._checked = np.zeros(len(sizes), dtype=bool)

    def _create_file(self, folder: Path) -> None:
        """Create the file of empty slots."""
        with open(folder / "pixels", "wb") as file:
            file.truncate(self.num_bytes)  # takes no space before it is written

    def read(self, index: int) -> np.ndarray:
        """Return an image in its stored form [H, W] or [H, W, 3]; it is decoded and stored when it was not yet.

        Raises:
            ImageError, OSError: the image must be decoded, and cannot be.
        """
        start = int(self.starts[index])
        if start < 0:
            return self._decode(index)[0]
        high, wide = self.stored_sizes[index].tolist()
        shape = (high, wide, 3) if self.channels == 3 else (high, wide)
        pixels = self._map[start + _HEAD : start + _HEAD + math.prod(shape)]
        if self._checked[index] or self._is_stored(start, pixels):
            self._checked[index] = True
            return pixels.reshape(shape)
        pixels, size = self._decode(index)
        if size == tuple(self.sizes[index].tolist()):  # else the file was replaced since it was listed
            self._write(start, pixels)
        return pixels

    def _is_stored(self, start: int, pixels: np.ndarray) -> bool:
        """Return whether the slot at `start` has an image whose checksum matches."""
        flag, checksum = self._map[start : start + _HEAD].view(np.uint32).tolist()
        return flag == 1 and checksum == zlib.crc32(pixels.data)

    def _write(self, start: int, pixels: np.ndarray) -> None:
        """Store an image; not through the map, where a full disk would be a signal that ends the process."""
        if self.full:
            return
        head = np.asarray([1, zlib.crc32(pixels.data)], dtype=np.uint32).tobytes()
        try:
            disk = os.fstatvfs(self._file)
            if disk.f_bavail * disk.f_frsize < _SPARE_BYTES:
                self.full = f"{self.folder}: less than {_SPARE_BYTES // 2**20} MiB are left on its disk"
                return
            for offset, content in ((start + _HEAD, pixels.data.cast("B")), (start, head)):
                while len(content):
                    written = os.pwrite(self._file, content, offset)
                    offset, content = offset + written, content[written:]
        except OSError as error:
            self.full = f"{self.folder}: {error.strerror}"


def stored_sizes_of(sizes: np.ndarray, side: int) -> np.ndarray:
    """Return the heights and widths [N, 2] of stored images: the short side is `side`, or unchanged where shorter."""
    scale = np.minimum(1.0, side / np.maximum(sizes.min(axis=1, keepdims=True), 1))
    return np.maximum(1, np.round(sizes * scale)).astype(np.int64)
