"""Decoding, on images that the tests make: every mode, every orientation, every way to be broken."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from vitrail.data.images import decode
from vitrail.data.images.decode import ImageError, inspect_image, is_image_name, read_image

ORIENTED = {  # EXIF orientation → how the stored rows and columns are reordered
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def photo(rng):
    """A smooth image, 48 wide and 32 high, that JPEG compresses like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return coarse.resize((48, 32), Image.Resampling.BICUBIC)


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels(source, **options) -> np.ndarray:
    return np.asarray(read_image(source, **options))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


# ---- good images ----


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpeg_has_the_bits_that_pillow_gives(photo, mode, options):
    data = saved(photo.convert(mode), "JPEG", **options)
    info = inspect_image(data)
    assert decode._read_plain_jpeg(data, info, 10**6) is not None
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(pixels(data, mode="L"), np.asarray(Image.open(io.BytesIO(data)).convert("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_orientation_is_applied_once(photo, file_format, orientation):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(photo, file_format, exif=exif(orientation), **options)
    stored = np.asarray(photo)
    if file_format == "JPEG":
        stored = np.asarray(Image.open(io.BytesIO(data)))
    expected = ORIENTED[orientation](stored)
    image = read_image(data)
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert 274 not in image.getexif()
    for info in (inspect_image(data), inspect_image(data, decode=False)):
        assert (info.orientation, info.height, info.width) == (orientation, *expected.shape[:2])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(photo, orientation):
    data = saved(photo, "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(pixels(data), np.asarray(photo))
    assert inspect_image(data).orientation == 1


def test_broken_exif_does_not_cost_the_image(photo):
    data = saved(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert inspect_image(data).verdict == "ok"
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(saved(photo, "JPEG")))))


def test_orientation_after_the_pixels_of_a_png_counts(photo):
    data = saved(photo, "PNG")
    at = data.index(b"IEND") - 4
    late = data[:at] + chunk(b"eXIf", exif(6)[6:]) + data[at:]
    np.testing.assert_array_equal(pixels(late), ORIENTED[6](np.asarray(photo)))
    assert inspect_image(late).orientation == 6


def test_alpha_is_composed_on_white(rng):
    values = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    values[0, :, 3], values[1, :, 3] = 0, 255
    got = pixels(saved(Image.fromarray(values), "PNG")).astype(int)
    alpha = values[..., 3:] / 255
    assert (got[0] == 255).all()
    np.testing.assert_array_equal(got[1], values[1, :, :3])
    np.testing.assert_allclose(got, values[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_grey_with_alpha_stays_grey():
    bands = [Image.fromarray(np.array([values], dtype=np.uint8)) for values in ([10, 10], [255, 0])]
    np.testing.assert_array_equal(pixels(saved(Image.merge("LA", bands), "PNG"), mode="L"), [[10, 255]])


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_transparent_palette_is_composed_on_white(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 100])
    image.putdata([0, 1, 2])
    got = pixels(saved(image, "PNG", transparency=transparency))[0]
    last = [0, 0, 100] if isinstance(transparency, int) else [127, 127, 177]
    np.testing.assert_allclose(got.astype(int), [[0, 0, 0], [255, 255, 255], last], atol=1)


@pytest.mark.parametrize(("mode", "key", "colour"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)])
def test_a_transparent_colour_is_white(mode, key, colour):
    data = saved(Image.new(mode, (2, 2), colour), "PNG", transparency=key)
    assert (pixels(data) == 255).all()


def test_16_bit_grey_is_scaled_and_its_transparent_value_is_white():
    values = np.array([[0, 257, 32768, 40000, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    for file_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(saved(image, file_format), mode="L"), [[0, 1, 128, 156, 255]])
    np.testing.assert_array_equal(pixels(saved(image, "PNG", transparency=40000), mode="L"), [[0, 1, 128, 255, 255]])
    pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(pixels(pgm, mode="L"), [[0, 1, 128, 156, 255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 200.4]], np.float32), [0, 0, 200]),
        (np.array([[-100.0, 0.0, 300.0]], np.float32), [0, 64, 255]),
        (np.array([[np.nan, 0.0, np.inf, 1000.0]], np.float32), [0, 0, 0, 255]),
        (np.array([[np.nan]], np.float32), [0]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-5, 100_000]], np.int32), [0, 255]),
        (np.array([[-5, -5]], np.int32), [0, 0]),
    ],
)
def test_wide_numbers_are_scaled_by_the_stated_rule(values, expected):
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(values), "TIFF"), mode="L"), [expected])


def test_cmyk_is_converted(photo):
    data = saved(photo.convert("CMYK"), "JPEG", quality=95)
    assert inspect_image(data).mode == "CMYK"
    assert np.abs(pixels(data).astype(int) - np.asarray(photo)).mean() < 5


def test_one_bit_and_grey_are_read_in_both_modes():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 255)
    np.testing.assert_array_equal(pixels(saved(image, "PNG"), mode="L"), [[0, 255]])
    np.testing.assert_array_equal(pixels(saved(image, "PNG")), [[[0] * 3, [255] * 3]])


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_is_used_and_frames_are_counted(file_format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0]))
    info = inspect_image(data)
    assert (info.format, info.frames, info.width, info.height) == (file_format, 3, 8, 6)


def test_the_content_decides_not_the_name(tmp_path, photo):
    path = tmp_path / "is_a_png.jpg"
    path.write_bytes(saved(photo, "PNG"))
    np.testing.assert_array_equal(pixels(path), np.asarray(photo))
    assert inspect_image(str(path)).format == "PNG"


# ---- bad images ----


def test_jpeg_without_its_end_is_damaged_wherever_it_was_cut(photo):
    data = saved(photo, "JPEG")
    start_of_scan = data.index(b"\xff\xda") + 20
    for length in [*range(start_of_scan, len(data), 7), len(data) - 2, len(data) - 1]:
        info = inspect_image(data[:length])
        assert info.verdict == "damaged", length
        assert (info.format, info.width, info.height) == ("JPEG", 48, 32)
    assert inspect_image(data + b"trailing bytes").verdict == "ok"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "PPM", "TGA", "GIF"])
def test_keep_returns_the_pixels_before_the_damage(rng, file_format):
    image = Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).resize((256, 256))
    data = saved(image, file_format, **({"interlace": 0} if file_format == "GIF" else {}))
    half = data[: len(data) * 6 // 10]
    with pytest.raises(ImageError, match="keep") as caught:
        read_image(half, name="half")
    assert (caught.value.path, caught.value.verdict) == ("half", "damaged")
    kept, whole = pixels(half, mode="L", damaged="keep"), pixels(data, mode="L")
    assert kept.shape == whole.shape
    first = slice(-64, None) if file_format in ("BMP", "TGA") else slice(64)  # these begin at the bottom
    np.testing.assert_array_equal(kept[first], whole[first])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_cut_tiff_is_kept_and_rotated(photo):
    data = saved(photo, "TIFF", exif=exif(6))  # uncompressed: its directory comes first
    kept = read_image(data[:-2000], damaged="keep")
    np.testing.assert_array_equal(np.asarray(kept)[:, -16:], ORIENTED[6](np.asarray(photo))[:, -16:])
    info = inspect_image(data[:-2000])
    assert (info.verdict, info.orientation, info.width, info.height) == ("damaged", 6, 32, 48)


@pytest.mark.parametrize("percent", range(60, 100, 3))
def test_damaged_progressive_jpeg_is_kept_and_rotated(photo, percent):
    data = saved(photo.resize((96, 64)), "JPEG", progressive=True, quality=95, exif=exif(6))
    cut = data[: len(data) * percent // 100]
    assert inspect_image(cut).orientation == 6
    assert read_image(cut, damaged="keep").size == (64, 96)


def test_png_with_a_broken_stream_is_damaged(photo):
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo))
    data = png(48, 32, chunk(b"IDAT", zlib.compress(rows)[:1500]))
    assert inspect_image(data).verdict == "damaged"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"<!DOCTYPE html><html></html>",
        b"%PDF-1.4\n%%EOF",
        b"\0" * 100,
        b"\xff\xd8\xff\xe0",
        bytes(range(256)),
    ],
    ids=["empty", "byte", "html", "pdf", "zeros", "start", "count"],
)
def test_no_image_at_all_is_unreadable(tmp_path, data):
    path = tmp_path / "named.jpg"
    path.write_bytes(data)
    for keep in ("refuse", "keep"):
        with pytest.raises(ImageError, match=r"named\.jpg: unreadable: \w") as caught:
            read_image(path, damaged=keep)
    assert caught.value.path == str(path)
    assert inspect_image(path).verdict == "unreadable"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_missing_file_is_not_a_verdict(tmp_path):
    for function in (read_image, inspect_image):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "none.jpg")


def test_too_many_pixels_are_refused_from_the_header():
    one_row = zlib.compress(bytes(40_001))
    bombs = {
        "png": png(40_000, 40_000, chunk(b"IDAT", one_row), bits=8, colour=0),
        "png, between Pillow's warning and its error": png(10_000, 12_000, chunk(b"IDAT", one_row), colour=0),
        "gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    }
    for name, data in bombs.items():
        for decode_pixels in (True, False):
            assert inspect_image(data, decode=decode_pixels).verdict == "refused", name
        with pytest.raises(ImageError, match="limit_pixels"):
            read_image(data, damaged="keep")


def test_the_pixel_limit_is_the_callers(photo):
    for file_format in ("JPEG", "PNG"):
        data = saved(photo, file_format)
        assert inspect_image(data, limit_pixels=48 * 32).verdict == "ok"
        info = inspect_image(data, limit_pixels=48 * 32 - 1)
        assert (info.verdict, info.width, info.height) == ("refused", 48, 32)


def test_raised_limit_reads_what_pillow_alone_would_refuse():
    data = png(20_000, 10_000, chunk(b"IDAT", b""), bits=1, colour=0)
    assert inspect_image(data, decode=False).verdict == "refused"
    assert inspect_image(data, limit_pixels=10**9, decode=False).verdict == "ok"


def test_a_text_bomb_does_not_take_memory_and_leaves_the_image():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))
    data = png(1, 1, text, chunk(b"IDAT", zlib.compress(b"\0\x01\x02\x03")))
    assert inspect_image(data).verdict == "damaged"
    np.testing.assert_array_equal(pixels(data, damaged="keep"), [[[1, 2, 3]]])


def test_random_damage_is_always_a_verdict(photo, rng):
    for file_format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "TGA", "PPM", "AVIF"):
        data = saved(photo, file_format)
        for _ in range(30):
            corrupted = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                corrupted[at] = rng.integers(0, 256)
            info = inspect_image(bytes(corrupted[: rng.integers(1, len(data) + 1)]), limit_pixels=10**6)
            assert (info.reason == "") == (info.verdict == "ok")


# ---- threads and warnings ----


def test_threads_do_not_disturb_each_other(photo):
    good, plain = saved(photo, "PNG"), saved(photo, "JPEG")
    bad = [saved(photo, "PNG")[:-60], saved(photo, "JPEG")[:-60], b"text"]
    wanted = [np.asarray(photo), np.asarray(Image.open(io.BytesIO(plain)))]

    def work(k: int) -> str:
        if k % 3 == 0:
            np.testing.assert_array_equal(pixels(good), wanted[0])
            np.testing.assert_array_equal(pixels(plain), wanted[1])
        elif k % 3 == 1:
            read_image(bad[k % 2], damaged="keep")
        return inspect_image(bad[k % 3]).verdict

    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(work, range(300)))
    assert verdicts == ["damaged", "damaged", "unreadable"] * 100


def test_pillow_warnings_stay_inside(photo):
    broken_tiff = saved(photo, "TIFF").replace(b"\x00\x01\x03\x00", b"\x00\x01\x99\x00", 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inspect_image(broken_tiff)
        inspect_image(saved(photo, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\0\0\0\0"))
        inspect_image(png(10_000, 9_500, chunk(b"IDAT", b""), bits=1, colour=0), decode=False)
    assert caught == []


# ---- names ----


@pytest.mark.parametrize("name", ["a.jpg", "A.JpEg", "x.y.PNG", "é 漢字.webp", "folder/a.tiff", "a.jfif", "a.avif"])
def test_names_of_images(name):
    assert is_image_name(name)


@pytest.mark.parametrize(
    "name",
    [
        ".hidden.jpg",
        "._a.jpg",
        "folder/.a.png",
        ".jpg",
        "jpg",
        "a",
        "a.txt",
        "Thumbs.db",
        "desktop.ini",
        "a.heic",
        "",
    ],
)
def test_names_that_are_no_images(name):
    assert not is_image_name(name)


def test_every_ending_is_one_that_pillow_opens():
    Image.init()
    known = {ending[1:] for ending, name in Image.registered_extensions().items() if name in (*decode.FORMATS, "MPO")}
    assert known >= decode.ENDINGS
