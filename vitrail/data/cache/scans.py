"""What a scan finds out about an image, cached on disk: an unchanged file need not be decoded to be scanned again."""

from __future__ import annotations

from typing import Literal

import numpy as np
import PIL
import simplejpeg

from vitrail.data.cache.rows import RowCache, rows_folder

THUMBNAIL = 32  # side of the grey copies, pixels
VERSIONS = (PIL.__version__, simplejpeg.__version__)  # of what decodes
FORMAT = 2  # raise it when a scan finds something else in the same file

# All that is known of an image that is whole. Texts are Pillow's names, cut at 12 letters; `described` is 0 for an image
# that is no file, of which there is no format.
ROW = np.dtype(
    [
        ("size", "<i4", 2),  # height and width, after EXIF rotation
        ("digest", "<u8"),  # of the decoded pixels and their size
        ("mode", "S12"),
        ("format", "S12"),
        ("orientation", "u1"),
        ("bits", "u1"),
        ("alpha", "u1"),
        ("described", "u1"),
        ("frames", "<i4"),
        ("thumbnail", "u1", (THUMBNAIL, THUMBNAIL)),  # grey copy
    ]
)


class ScanCache:
    """The rows of some images of a dataset. Only whole images are cached: a file with a fault is named each time.

    Args:
        name: of the dataset; every command that reads the same files must give the same.
        keys: [N] what each of the images is known by.
        mode: the pixel format in which the images are decoded.
    """

    def __init__(self, name: str, keys: np.ndarray, mode: Literal["RGB", "L"], *, limit_pixels: int) -> None:
        folder = rows_folder("scans", name, (FORMAT, *VERSIONS, mode, limit_pixels))
        self.rows, self.keys = RowCache(folder, ROW.itemsize, np.uint8), keys

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images' rows [N] and whether each is there [N]."""
        values, found = self.rows.read(self.keys)
        return values.view(ROW)[:, 0] if len(values) else np.zeros(0, ROW), found

    def add(self, positions: np.ndarray, rows: np.ndarray) -> None:
        """Store the rows of some of the images; a cache that cannot be written is done without."""
        try:
            self.rows.add(self.keys[positions], np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1))
        except OSError:
            return


class ColourCache:
    """Whether single images have colour, which decides the pixel format of a whole scan.

    Args:
        damaged: whether damaged images are read too.
    """

    def __init__(self, name: str, keys: np.ndarray, *, limit_pixels: int, damaged: bool) -> None:
        folder = rows_folder("colour", name, (FORMAT, *VERSIONS, limit_pixels, damaged))
        self.rows, self.keys = RowCache(folder, 1, np.uint8), keys

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each image has colour [N], and whether that is known [N]."""
        values, found = self.rows.read(self.keys)
        return values[:, 0] == 1, found

    def add(self, positions: list[int], has_colour: list[bool]) -> None:
        """Store what was found; a cache that cannot be written is done without."""
        try:
            self.rows.add(self.keys[positions], np.asarray(has_colour, np.uint8)[:, None])
        except OSError:
            return
