"""Decode JPEG by simplejpeg: faster than Pillow for small images and, at a fraction of their size, for large ones.

Both use libjpeg-turbo and give the same bits (5,842 files of four sources). simplejpeg is strict: where libjpeg complains
of anything (a missing end, stray bytes) or a header is unusual, None is returned, and Pillow decides.
"""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

START = b"\xff\xd8\xff"
FACTORS = (8, 4, 2)  # libjpeg has fast code for these; 7/8, 6/8, 5/8 and 3/8 cost more than the whole image
_ORIENTATION = 274
_REUSED_BYTES = 64 * 2**20  # memory for a larger image is not reused for the next one
_XMP_ORIENTATION = b"tiff:Orientation"
_EXIF, _SCAN = b"Exif\0\0", b"\xff\xda"


class JpegHeader(NamedTuple):
    """The header of a JPEG: sides in pixels as stored, colour space, and EXIF's orientation 1 to 8."""

    width: int
    height: int
    colour_space: str
    orientation: int

    @property
    def oriented_size(self) -> tuple[int, int]:
        """Width and height after EXIF rotation."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)

    @property
    def mirrored(self) -> bool:
        """Whether the image as seen begins with what is stored last in each of its rows."""
        return self.orientation in (2, 3, 6, 7)

    @property
    def upside_down(self) -> bool:
        """Whether the image as seen begins with what is stored last in each of its columns."""
        return self.orientation in (3, 4, 7, 8)


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG of three colours or of grey; None for anything else, and where Pillow must decide."""
    if not data.startswith(START):
        return None
    orientation = _orientation(data)
    if not orientation:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return JpegHeader(int(width), int(height), space, orientation) if space in ("YCbCr", "Gray") else None


def _orientation(data: bytes) -> int:
    """Return the orientation that Pillow would find in EXIF; 0 where only Pillow knows."""
    exif, offset = b"", 2
    while data[offset : offset + 2] != _SCAN:
        if data[offset : offset + 1] != b"\xff":
            return 0
        if data[offset + 1 : offset + 2] == b"\xff":  # padding before a marker
            offset += 1
            continue
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        if length < 2:
            return 0
        if data[offset + 1] == 0xE1 and data.startswith(_EXIF, offset + 4):
            if exif:
                return 0
            exif = data[offset + 4 : offset + 2 + length]
        offset += 2 + length
    if _XMP_ORIENTATION in data[:offset]:
        return 0
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif)
        orientation = tags.get(_ORIENTATION)
        return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    except Exception:  # a broken EXIF block raises nearly every kind of exception; `decode.py` ignores it too
        return 1


def decode_jpeg(data: bytes, header: JpegHeader, mode: Literal["RGB", "L"], factor: int = 1) -> np.ndarray | None:
    """Decode a JPEG and rotate it as EXIF says; None where Pillow must decide.

    Args:
        mode: "RGB", or "L" for a JPEG that is grey itself; a colour one stays RGB.
        factor: 1, or one of FACTORS: the sides are divided by it, rounded up, by leaving out frequencies.

    Returns:
        uint8 [H, W, 3] or [H, W], in memory that the thread reuses for its next JPEG.
    """
    height, width = -(-header.height // factor), -(-header.width // factor)
    space = "RGB" if mode == "RGB" or header.colour_space == "YCbCr" else "GRAY"
    channels = 3 if space == "RGB" else 1
    memory = _memory(height * width * channels)
    try:
        if factor == 1:
            pixels = simplejpeg.decode_jpeg(data, space, buffer=memory)
        else:
            pixels = simplejpeg.decode_jpeg(
                data, space, min_height=height, min_width=width, min_factor=factor, buffer=memory
            )
    except ValueError:
        return None
    assert pixels.shape[:2] == (height, width), (pixels.shape, height, width)
    return apply_orientation(pixels if channels == 3 else pixels[:, :, 0], header)


_reused = threading.local()


def _memory(num_bytes: int) -> np.ndarray:
    """Return the thread's reused memory for pixels; fresh memory of this size would cost as much time as decoding."""
    if num_bytes > _REUSED_BYTES:
        return np.empty(num_bytes, dtype=np.uint8)
    memory = getattr(_reused, "pixels", None)
    if memory is None or len(memory) < num_bytes:
        memory = _reused.pixels = np.empty(num_bytes, dtype=np.uint8)
    return memory[:num_bytes]


def apply_orientation(pixels: np.ndarray, header: JpegHeader) -> np.ndarray:
    """Return a view of stored pixels [H, W, …], rotated and mirrored by EXIF's orientation."""
    if header.orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if header.upside_down else 1, :: -1 if header.mirrored else 1]
