"""JPEG by simplejpeg: faster than Pillow for small images and, decoded smaller than they are, for large ones.

Both use libjpeg-turbo and give the same bits (5,842 files of four sources). simplejpeg is strict: at any complaint of
libjpeg (a missing end, stray bytes) Pillow evaluates the file, and so it does where a JPEG's header is out of the ordinary.
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
_KEPT_BYTES = 64 * 2**20  # a larger image's pixels are not kept for the next one
_XMP_ORIENTATION = b"tiff:Orientation"
_EXIF, _SCAN = b"Exif\0\0", b"\xff\xda"


class Jpeg(NamedTuple):
    """The header of a JPEG: sides in pixels as stored, colour space, and EXIF's orientation 1 to 8."""

    width: int
    height: int
    space: str
    turn: int

    @property
    def turned_size(self) -> tuple[int, int]:
        """Width and height as seen."""
        return (self.width, self.height) if self.turn < 5 else (self.height, self.width)

    @property
    def mirrored(self) -> bool:
        """Whether the image as seen begins with what is stored last in each of its rows."""
        return self.turn in (2, 3, 6, 7)

    @property
    def upside_down(self) -> bool:
        """Whether the image as seen begins with what is stored last in each of its columns."""
        return self.turn in (3, 4, 7, 8)


def jpeg_header(data: bytes) -> Jpeg | None:
    """Read the header of a JPEG of three colours or of grey; None for anything else, and where Pillow must decide."""
    if not data.startswith(START):
        return None
    turn = _turn(data)
    if not turn:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return Jpeg(int(width), int(height), space, turn) if space in ("YCbCr", "Gray") else None


def _turn(data: bytes) -> int:
    """Return the orientation that Pillow would find in EXIF; 0 where only Pillow knows."""
    exif, at = b"", 2
    while data[at : at + 2] != _SCAN:
        if data[at : at + 1] != b"\xff":
            return 0
        if data[at + 1 : at + 2] == b"\xff":  # padding before a marker
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            return 0
        if data[at + 1] == 0xE1 and data.startswith(_EXIF, at + 4):
            if exif:
                return 0
            exif = data[at + 4 : at + 2 + length]
        at += 2 + length
    if _XMP_ORIENTATION in data[:at]:
        return 0
    if not exif:
        return 1
    try:
        found = Image.Exif()
        found.load(exif)
        turn = found.get(_ORIENTATION)
        return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1
    except Exception:  # a broken EXIF block raises nearly every kind of exception; `decode.py` takes it for none too
        return 1


def decode_jpeg(data: bytes, header: Jpeg, mode: Literal["RGB", "L"], factor: int = 1) -> np.ndarray | None:
    """Decode a JPEG, turned as EXIF says; None where Pillow must decide.

    Args:
        mode: "RGB", or "L" for a JPEG that is grey itself; a colour one stays RGB.
        factor: 1, or one of FACTORS: the sides become that many times smaller, rounded up, by leaving out frequencies.

    Returns:
        uint8 [H, W, 3] or [H, W]; it lies in the thread's own memory and is good until its next JPEG.
    """
    height, width = -(-header.height // factor), -(-header.width // factor)
    space = "RGB" if mode == "RGB" or header.space == "YCbCr" else "GRAY"
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
    return turned(pixels if channels == 3 else pixels[:, :, 0], header)


_kept = threading.local()


def _memory(num_bytes: int) -> np.ndarray:
    """Return the thread's memory for pixels: fresh memory of this size would cost as much time as decoding into it."""
    if num_bytes > _KEPT_BYTES:
        return np.empty(num_bytes, dtype=np.uint8)
    kept = getattr(_kept, "pixels", None)
    if kept is None or len(kept) < num_bytes:
        kept = _kept.pixels = np.empty(num_bytes, dtype=np.uint8)
    return kept[:num_bytes]


def turned(pixels: np.ndarray, header: Jpeg) -> np.ndarray:
    """Return a view of stored pixels [H, W, …] as EXIF's orientation wants them seen."""
    if header.turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if header.upside_down else 1, :: -1 if header.mirrored else 1]
