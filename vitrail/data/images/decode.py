"""Decode image files to pixels; no other code of Vitrail decodes images.

Every image is treated alike, whatever its format: EXIF orientation is applied; an animation or a multi-page
file gives its first frame; transparency is composed on white; 16 bits become 8 over their nominal range, not
clipped; CMYK becomes RGB by Pillow's formula; colour profiles (ICC) are ignored, so numbers are taken as sRGB.

All functions may be called from several threads at once. Two settings of Pillow are process-wide, and are changed
here: its warnings are silenced (what matters in them is returned as a verdict), and `Image.MAX_IMAGE_PIXELS` is
raised, never lowered, to the largest `limit_pixels` asked for. libtiff's complaints on stderr cannot be silenced.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
import warnings
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageFile, UnidentifiedImageError

from vitrail.data.images.jpeg import START as JPEG_START
from vitrail.data.images.jpeg import decode_jpeg, jpeg_header
from vitrail.data.images.pixel_modes import to_8_bit

# damaged: a part of the pixels can be recovered. unreadable: no image, or one of which nothing can be recovered
# (so are WebP, AVIF, JPEG 2000 that were cut: their decoders give all or nothing). refused: too many pixels.
Verdict = Literal["ok", "damaged", "unreadable", "refused"]
Stream = io.BytesIO | io.BufferedReader

# Format → file name endings, the usual one first; MPO is a JPEG of several images.
ENDINGS_OF = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "MPO": ("jpg", "jpeg", "jpe", "jfif", "mpo"), "PNG": ("png", "apng"),
    "GIF": ("gif",), "BMP": ("bmp", "dib"), "DIB": ("bmp", "dib"), "WEBP": ("webp",), "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",), "PPM": ("ppm", "pgm", "pbm", "pnm"), "TGA": ("tga",), "JPEG2000": ("jp2", "j2k"), "ICO": ("ico",),
}  # fmt: skip
ENDINGS = frozenset(ending for endings in ENDINGS_OF.values() for ending in endings)
# In the order in which they are tried. MPO comes with JPEG; TGA has no magic number, so it is last. Left out on
# purpose: formats that make Pillow start another program (EPS) or that hold no pixels (fonts, metafiles).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
WHOLE_BYTES = 64 * 2**20  # larger files are not read into memory at once
MEND_BYTES = 2**30  # of a larger damaged file, only the beginning is fixed
JPEG_END, PNG_START = b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
MPF_MARK = b"MPF\0"  # the block of a JPEG that lists further images
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
EXIF_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow looks for EXIF
ORIENTATION = 274
T = Image.Transpose
TRANSPOSES = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
TRANSPOSES |= {6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}
QUIET_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as warnings.filterwarnings stores it
_settings_lock = threading.Lock()


@dataclass(frozen=True)
class ImageInfo:
    """Verdict, format and size of an image file.

    `reason` is empty when the verdict is "ok". Width and height (px) are those after EXIF rotation, 0 when no
    header could be read; `mode` is Pillow's name for what is stored, `bits` how many a channel has there, `alpha`
    whether any pixel may be transparent; `orientation` is EXIF's 1 to 8, and 1 when there is none or it is broken;
    `frames` counts the pages or the images of an animation.
    """

    path: str
    verdict: Verdict
    reason: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    orientation: int = 1
    frames: int = 1
    bits: int = 8
    alpha: bool = False


class ImageError(ValueError):
    """Raised for a file that cannot be decoded; `info` holds all that is known of it."""

    def __init__(self, info: ImageInfo) -> None:
        super().__init__(info)
        self.info, self.path, self.verdict, self.reason = info, info.path, info.verdict, info.reason

    def __str__(self) -> str:
        return f"{self.path}: {self.verdict}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image, by its ending.

    Hidden files (`.x.jpg`, macOS's `._x.jpg`) never are. HEIC is not: Pillow alone cannot open it.
    """
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in ENDINGS


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    mode: Literal["RGB", "L"] = "RGB",
    limit_pixels: int = 100_000_000,
    damaged: Literal["refuse", "keep"] = "refuse",
    name: str | None = None,
) -> Image.Image:
    """Decode one image to 8 bits a channel, as described at the top of this module.

    Args:
        source: a path, or the file's bytes.
        mode: colour, or grey by ITU-R 601.
        limit_pixels: an image of more pixels is refused from its header.
        damaged: "keep" returns the pixels that a damaged file still holds; the rest is black, or grey in a JPEG.
        name: the image's name in messages, instead of its path.

    Raises:
        ImageError: the file is damaged (unless kept), unreadable or refused.
        OSError: the file is missing, or the disk failed.
    """
    image, info = _read(source, name, limit_pixels, decode=True, count=False)
    if image is None or (info.verdict == "damaged" and damaged != "keep"):
        raise ImageError(info)
    return image if image.mode == mode else image.convert(mode)


def as_decoded(image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    """Return an image from memory as decoding its file would give it: rotated by its EXIF, opaque, in `mode`."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:
        orientation = 1
    image = to_8_bit(image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image)
    return image if image.mode == mode else image.convert(mode)


def inspect_image(
    source: str | os.PathLike[str] | bytes, *, limit_pixels: int = 100_000_000, decode: bool = True
) -> ImageInfo:
    """Return the verdict on one file; a bad image raises nothing, a missing file or a failing disk raises OSError.

    Without `decode` only the header is read, and "ok" means no more than that the header is good.
    """
    return _read(source, None, limit_pixels, decode, count=True)[1]


def read_described(
    source: str | os.PathLike[str] | bytes, *, limit_pixels: int = 100_000_000
) -> tuple[Image.Image | None, ImageInfo]:
    """Return one decoded image and the description of its file, which is read once.

    The image is in mode L or RGB; it is None where nothing could be decoded, and incomplete where the verdict is
    "damaged". A missing file or a failing disk raises OSError.
    """
    return _read(source, None, limit_pixels, decode=True, count=True)


def _read(
    source: str | os.PathLike[str] | bytes, name: str | None, limit_pixels: int, decode: bool, count: bool
) -> tuple[Image.Image | None, ImageInfo]:
    """Return the image (mode L or RGB) where there is one, damaged or not, and the description of its file."""
    in_memory = isinstance(source, bytes)
    info = ImageInfo(name or ("<bytes>" if in_memory else os.fspath(source)), "ok")
    with io.BytesIO(source) if in_memory else open(source, "rb") as stream:
        whole = stream.seek(0, os.SEEK_END) <= WHOLE_BYTES
        stream.seek(0)
        data = stream.read() if whole else b""
        has_several = count and MPF_MARK in data  # images in one JPEG, which only Pillow counts
        if decode and not has_several and (plain := _read_plain_jpeg(data, info, limit_pixels)):
            return plain
        return _read_any(io.BytesIO(data) if whole else stream, info, limit_pixels, decode, count)


def _read_plain_jpeg(data: bytes, info: ImageInfo, limit_pixels: int) -> tuple[Image.Image, ImageInfo] | None:
    """Decode a JPEG by the rules at the top of this module; None where only Pillow can."""
    header = jpeg_header(data)
    if header is None or header.width * header.height > limit_pixels:
        return None
    mode = "RGB" if header.colour_space == "YCbCr" else "L"
    pixels = decode_jpeg(data, header, mode)
    if pixels is None:
        return None
    # A grey image would share the thread's memory; colour is copied, since Pillow keeps four bytes a pixel.
    image = Image.fromarray(pixels.copy() if mode == "L" else pixels)
    width, height = image.size
    return image, replace(info, format="JPEG", width=width, height=height, mode=mode, orientation=header.orientation)


def _read_any(
    stream: Stream, info: ImageInfo, limit_pixels: int, decode: bool, count: bool
) -> tuple[Image.Image | None, ImageInfo]:
    """Decode an image by Pillow; where that fails, decode what a fixed copy of the file still holds."""
    _set_pillow(limit_pixels)
    try:
        image, info_read = _decode(stream, info, limit_pixels, decode)
        return image, replace(info_read, frames=_count_frames(stream)) if count else info_read
    except ImageError as error:
        error_info = error.info
    if error_info.verdict == "refused":
        return None, error_info
    try:  # damaged if anything can be recovered, else unreadable
        image, info_read = _decode(_mend(stream), info, limit_pixels, decode, tolerant=True)
    except ImageError as error:
        return None, error.info if error.verdict == "refused" else error_info
    reason = f'{error_info.reason}; damaged="keep" decodes what is left'
    return image, replace(info_read, verdict="damaged", reason=reason)


def _set_pillow(limit_pixels: int) -> None:
    """Change the two process-wide settings of Pillow (see the top of this module).

    `warnings.catch_warnings` around a decode is not thread-safe, and under warnings as errors Pillow would give up
    on images that it can decode. Its own size limit stays as a net, at twice `limit_pixels`, for sizes that no
    header shows (a GIF's frame, the PNG inside an ICO).
    """
    with _settings_lock:
        if warnings.filters[:1] != [QUIET_PILLOW]:
            warnings.filterwarnings("ignore", module=QUIET_PILLOW[3].pattern)
        if Image.MAX_IMAGE_PIXELS is not None:
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit_pixels)


def _decode(
    stream: Stream, info: ImageInfo, limit_pixels: int, decode: bool, tolerant: bool = False
) -> tuple[Image.Image | None, ImageInfo]:
    """Decode with Pillow; raise `ImageError` with what is known ("unreadable" stands for any fault)."""
    try:
        with Image.open(stream, formats=FORMATS) as opened:
            info = _describe(opened, info)
            _check_size(info, limit_pixels)
            if not decode:
                return None, info
            _load(opened, tolerant)
            orientation = _orientation(opened)  # read again: a PNG may have it at its end, a TIFF was rotated by Pillow
            image = to_8_bit(opened.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else opened)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        reason = f"far more pixels than limit_pixels={limit_pixels} ({error})"
        raise ImageError(replace(info, verdict="refused", reason=reason)) from error
    except Exception as error:  # Pillow's formats raise nearly every kind of exception
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's fault; EINVAL is a seek to nowhere, ordered by a broken image
        reason = _explain(error, stream, info)
        raise ImageError(replace(info, verdict="unreadable", reason=reason)) from error
    image.info = {}  # no EXIF or profile left that a later step could apply once more
    orientation = max(orientation, info.orientation)
    info = replace(info, orientation=orientation, width=image.width, height=image.height)
    _check_size(info, limit_pixels)  # checked again: an ICO holds images of other sizes than it says
    return image, info


def _describe(opened: ImageFile.ImageFile, info: ImageInfo) -> ImageInfo:
    """Return `info` with what the header says, before any pixel is decoded."""
    orientation, (width, height), file_format = _orientation(opened), opened.size, opened.format or ""
    if orientation >= 5 and file_format != "TIFF":  # Pillow has swapped those of a TIFF already
        width, height = height, width
    storage = {"mode": opened.mode, "bits": _bits(opened), "alpha": opened.has_transparency_data}
    return replace(info, format=file_format, width=width, height=height, orientation=orientation, **storage)


def _bits(opened: ImageFile.ImageFile) -> int:
    """Return the bits of a channel in the file; Pillow opens 16-bit colour with 8."""
    if opened.mode in ("I", "F"):
        return 16 if opened.format in ("PNG", "PPM") else 32
    return 16 if ";16" in opened.mode or any(";16" in str(tile) for tile in opened.tile) else 8


def _check_size(info: ImageInfo, limit_pixels: int) -> None:
    if info.width * info.height > limit_pixels:
        reason = f"{info.width} x {info.height} pixels, more than limit_pixels={limit_pixels}; raise it"
        raise ImageError(replace(info, verdict="refused", reason=reason))


def _orientation(opened: ImageFile.ImageFile) -> int:
    """Return EXIF's orientation, 1 to 8; 1 where there is none or it is broken."""
    if opened.format != "TIFF" and not any(key in opened.info for key in EXIF_KEYS):
        return 1
    try:
        value = Image.Image.getexif(opened).get(ORIENTATION)  # PNG's own getexif decodes all pixels
        return int(value) if value in TRANSPOSES else 1
    except Exception:
        return 1


def _load(opened: ImageFile.ImageFile, tolerant: bool) -> None:
    """Decode the pixels; if tolerant, keep those before a fault.

    `ImageFile.LOAD_TRUNCATED_IMAGES` would do this for all threads at once, and so let their damaged files pass.
    Instead: decoders write straight into the image's memory, where a fault leaves what was decoded before it,
    and an image without tiles counts as loaded.
    """
    try:
        opened.load()
    except Exception:
        opened.tile = []
        if not tolerant or opened.getbbox(alpha_only=False) is None:  # nothing but zeros
            raise


def _mend(stream: Stream) -> Stream:
    """Give a JPEG an end, so that libjpeg hands out its last rows; reduce a PNG to what its pixels need."""
    stream.seek(0)
    data = stream.read(MEND_BYTES)
    if data.startswith(JPEG_START):
        last = max(data.rfind(b"\xff\xc4"), data.rfind(b"\xff\xda"))  # a table or scan header cut short goes
        unfinished = last + 2 + int.from_bytes(data[last + 2 : last + 4], "big") > len(data)
        return io.BytesIO((data[:last] if unfinished else data) + JPEG_END)
    if not data.startswith(PNG_START):
        return io.BytesIO(data)
    chunks, offset = [PNG_START], len(PNG_START)
    while offset < len(data):
        length = 12 + int.from_bytes(data[offset : offset + 4], "big")  # length, name, body, checksum
        chunk = data[offset : offset + length]
        chunks.append(chunk if chunk[4:8] in PNG_CHUNKS else b"")
        offset += len(chunk)
    return io.BytesIO(b"".join(chunks))


def _count_frames(stream: Stream) -> int:
    """Return how many pages or frames a file has; 1 where Pillow cannot count them."""
    try:
        with Image.open(stream, formats=FORMATS) as opened:
            return getattr(opened, "n_frames", 1)
    except Exception:
        return 1


def _explain(error: Exception, stream: Stream, info: ImageInfo) -> str:
    """Return why a file cannot be decoded, for people."""
    cause = str(error) or type(error).__name__
    if info.format:
        return f"{info.format} of {info.width} x {info.height}: {cause}"
    stream.seek(0)
    start = stream.read(12)
    if not start:
        return "the file is empty"
    unknown = isinstance(error, UnidentifiedImageError)
    return f"{'not an image of a known format' if unknown else cause}; the file begins with {start!r}"
