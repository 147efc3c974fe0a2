"""Crops from files: the same pixels by every decoder, decoding at a fraction only where it is set, and the cache."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitrail.api import train
from vitrail.config import AugmentConfig, DataConfig, PreprocessConfig, RunConfig
from vitrail.console import Console
from vitrail.data.cache.decoded import DecodedImageCache, stored_sizes_of
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.decode import ImageError, read_image
from vitrail.data.images.jpeg import FACTORS, decode_jpeg, jpeg_header
from vitrail.data.images.preprocess import INTERPOLATIONS
from vitrail.data.loading.crop_decode import Box, CropReader, by_pillow, by_torch, shrunk
from vitrail.data.setup import CheckedData, build_train_data, load_data
from vitrail.distributed import World
from vitrail.models.config import ViTConfig
from vitrail.tensor_files import load_tensors
from vitrail.training.reporting import report_dropped


def photo(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, orientation: int = 0, **options) -> bytes:
    buffer = io.BytesIO()
    tags = Image.Exif()
    if orientation:
        tags[274] = orientation
    image.save(buffer, "JPEG", exif=tags.tobytes(), **{"quality": 90, **options})
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes and orientations, grey ones, and PNGs, in two classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(16):
        class_folder = root / "ab"[number % 2]
        class_folder.mkdir(exist_ok=True)
        image = photo(number, 90 + 7 * number, 160 - 5 * number)
        if number == 3:
            image.save(class_folder / f"{number:02d}.png")
        else:
            image = image.convert("L") if number == 5 else image
            (class_folder / f"{number:02d}.jpg").write_bytes(jpeg(image, number % 9))
    return root


def middle(width: int, height: int) -> Box:
    return Box(0.1 * width, 0.2 * height, 0.7 * width, 0.6 * height)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_exact_crops_have_the_bits_of_pillows_decoding(folder, mode, interpolation):
    dataset, crop_reader = open_dataset(str(folder)), CropReader(24, interpolation, mode)
    for index in range(len(dataset.paths)):
        image = dataset.read(index, mode)
        with Image.open(dataset.location(index)) as opened:  # another decoder than the one under test
            own = ImageOps.exif_transpose(opened).convert("RGB").convert(mode)
        expected = by_pillow(np.asarray(own), middle(*image.size), (24, 24), interpolation)
        np.testing.assert_array_equal(crop_reader.read(dataset, index, middle), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(2, 300), st.integers(2, 300)),
    st.integers(1, 64),
    st.sampled_from(sorted(INTERPOLATIONS)),
)
def test_pillow_gets_all_pixels_that_its_filter_reaches(seed, size, side, interpolation):
    """Against Pillow's resizing of the whole image, up to the rounding between its two passes."""
    random = np.random.default_rng(seed)
    image = photo(seed, *size)
    width, height = (max(1.0, extent * share) for extent, share in zip(size, random.random(2), strict=True))
    left, top = random.random() * (size[0] - width), random.random() * (size[1] - height)
    got = by_pillow(np.asarray(image), Box(left, top, width, height), (side, side), interpolation)
    corners = (left, top, min(left + width, size[0]), min(top + height, size[1]))
    whole = np.asarray(image.resize((side, side), INTERPOLATIONS[interpolation], box=corners)).transpose(2, 0, 1)
    difference = np.abs(got.astype(int) - whole)
    # Smooth images: a filter that missed a pixel would be off everywhere; overshoot is cut off between the passes.
    assert difference.max() <= (3 if interpolation in ("bicubic", "lanczos") else 1)


def test_fast_crops_differ_little_and_come_from_smaller_decoding():
    random = np.random.default_rng(0)
    image = photo(1, 640, 480)
    data = jpeg(image)
    header = jpeg_header(data)
    assert header is not None
    exact, fast = CropReader(48, "bilinear", "RGB"), CropReader(48, "bilinear", "RGB", fast=True)
    for share, factor in ((1.0, 8), (0.6, 4), (0.25, 2), (0.15, 1)):
        box = Box(30.0, 20.0, 640 * share - 60, 480 * share - 20) if share < 1 else Box(0, 0, 640, 480)
        assert fast.factor(box) == factor
        assert exact.factor(box) == 1
    for number in range(20):
        side = 60 + 380 * random.random()
        box = Box(random.random() * (640 - side), random.random() * (480 - side), side, side)
        pixels = []
        for crop_reader in (exact, fast):
            decoded = decode_jpeg(data, header, "RGB", crop_reader.factor(box))
            assert decoded is not None
            shrunk_box = shrunk(box, crop_reader.factor(box), header, decoded.shape)
            pixels.append(crop_reader.resize(decoded, shrunk_box, (48, 48)).astype(int))
        assert np.abs(pixels[0] - pixels[1]).mean() < 4, number  # of 255; another box gives about 40


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoding_at_a_fraction_is_rotated_too(factor, orientation):
    data = jpeg(photo(2, 161, 90), orientation)
    header = jpeg_header(data)
    assert header is not None
    assert header.orientation == orientation
    whole = decode_jpeg(data, header, "RGB")
    assert whole is not None
    whole = np.array(whole).astype(int)
    small = decode_jpeg(data, header, "RGB", factor)
    assert small is not None
    assert whole.shape[1::-1] == header.oriented_size
    assert small.shape[:2] == tuple(-(-side // factor) for side in whole.shape[:2])
    box = shrunk(Box(0.0, 0.0, *header.oriented_size), factor, header, small.shape)
    for row, column in ((1, 1), (1, small.shape[1] - 2), (small.shape[0] - 2, 1)):  # a pixel is a block's mean
        top, left = round((row - box.top) * factor), round((column - box.left) * factor)
        block = whole[top : top + factor, left : left + factor]
        assert np.abs(block.mean(axis=(0, 1)) - small[row, column]).max() < 6


def test_the_two_resizers_differ_by_two_levels_at_most():
    pixels = np.asarray(photo(5, 300, 200))
    for box in (Box(10, 20, 200, 150), Box(0, 0, 300, 200), Box(3, 5, 40, 30)):
        one, other = (by(pixels, box, (64, 64), "bilinear").astype(int) for by in (by_pillow, by_torch))
        assert np.abs(one - other).max() <= 2


def test_a_damaged_file_is_an_error_by_name_in_every_form(folder, tmp_path):
    root = tmp_path / "copy"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(2):
            (root / name / f"{number}.jpg").write_bytes(jpeg(photo(number, 200, 150)))
    dataset = open_dataset(str(root))
    broken = root / "a" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:-900])
    for fast in (False, True):
        with pytest.raises(ImageError, match=r"a/0\.jpg: damaged"):
            CropReader(16, "bilinear", "RGB", fast).read(dataset, 0, middle)


def test_header_of_what_is_no_plain_jpeg_is_none():
    assert jpeg_header(b"") is None
    assert jpeg_header(b"\xff\xd8\xff") is None
    assert jpeg_header(b"\x89PNG\r\n\x1a\n") is None
    assert jpeg_header(jpeg(photo(0, 20, 20).convert("CMYK"))) is None
    assert jpeg_header(jpeg(photo(0, 20, 20))[:30]) is None


def loaded(folder: Path, **data) -> tuple[RunConfig, CheckedData]:
    settings_ = DataConfig(source=str(folder), memory_bytes=0, near_duplicates=False, workers=2, **data)
    config = RunConfig(
        data=settings_,
        model=ViTConfig(image_size=24, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=2),
        preprocess=PreprocessConfig(interpolation="bilinear"),
        augment=AugmentConfig(crop_scale=0.3, flip=0.5),
        batch_size=4,
    )
    return config, load_data(settings_, Console(quiet=True), channels=3)


def batches(config: RunConfig, checked: CheckedData, start: int = 0, stop: int = 9):
    from vitrail.distributed import World

    data = build_train_data(checked, config)
    return data, list(data.loader(config, torch.device("cpu"), World()).batches(start, stop))


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_batches_do_not_depend_on_the_cache(folder, decode, monkeypatch, tmp_path):
    """An empty cache, a half full one and a full one, threads or not, and one without a slot for most images."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "one"))
    config, checked = loaded(folder, decode=decode, cache_side=32)
    data, first = batches(config, checked)
    cache = data.reader.cache
    assert cache is not None
    assert cache.num_stored == len(data.splits.indices["train"])
    monkeypatch.setattr(CropReader, "whole", None)  # all images are stored: nothing may be decoded any more
    again, second = batches(config, checked)
    assert again.reader.cache is not None
    assert again.reader.cache.folder == cache.folder
    monkeypatch.undo()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "two"))
    _, late = batches(config, checked, 3, 9)
    few, rest = batches(replace(config, data=replace(config.data, cache_bytes=8000)), checked)
    assert few.reader.cache is not None
    assert 0 < few.reader.cache.num_stored < cache.num_stored
    for other in (second, late, rest):
        for one, two in zip(first[-len(other) :], other, strict=True):
            assert torch.equal(one.images, two.images)
            assert one.indices.tolist() == two.indices.tolist()


def test_a_damaged_cache_entry_is_decoded_again(folder, monkeypatch, tmp_path):
    """A process that was killed, or a disk that lies: a slot whose checksum does not match is not used."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    config, checked = loaded(folder, cache_side=32)
    data, first = batches(config, checked)
    assert data.reader.cache is not None
    path = data.reader.cache.folder / "pixels"
    content = bytearray(path.read_bytes())
    for at in range(100, len(content), 5000):
        content[at] ^= 255
    path.write_bytes(content)
    _, second = batches(config, checked)
    assert all(torch.equal(one.images, two.images) for one, two in zip(first, second, strict=True))
    assert path.read_bytes() != bytes(content)


def test_a_changed_file_has_another_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    for path in folder.rglob("*.*"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    config, checked = loaded(copy, cache_side=32)
    data, _ = batches(config, checked)
    changed = Path(data.dataset.location(int(data.splits.indices["train"][0])))
    changed.write_bytes(jpeg(photo(99, 120, 100)))
    again, found = batches(*loaded(copy, cache_side=32))
    assert data.reader.cache is not None
    assert again.reader.cache is not None
    assert data.reader.cache.folder != again.reader.cache.folder
    assert all(np.isfinite(batch.images.numpy()).all() for batch in found)


def test_a_full_disk_stops_the_caching_and_not_the_training(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    config, checked = loaded(folder, cache_side=32)
    data = build_train_data(checked, config)
    cache = data.reader.cache
    assert cache is not None
    cache._file = os.open("/dev/full", os.O_RDWR)  # every write there says that the disk is full
    indices = data.splits.indices["train"]
    before = cache.read(int(indices[0]))
    assert "No space left" in cache.full
    np.testing.assert_array_equal(cache.read(int(indices[0])), before)
    session = SimpleNamespace(data=data, console=Console(), world=World())
    report_dropped(session)  # type: ignore[arg-type]
    report_dropped(session)  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("no more images are cached decoded") == 1


def test_threads_share_a_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    config, checked = loaded(folder, cache_side=32)
    caches = [build_train_data(checked, config).reader.cache for _ in range(2)]  # as two processes would have
    indices = checked.splits.indices["train"].tolist()
    wanted = {index: np.array(caches[0]._decode(index)[0]) for index in indices}  # type: ignore[union-attr]
    wrong: list[int] = []

    def read(cache: DecodedImageCache) -> None:
        for index in indices * 3:
            if not np.array_equal(cache.read(index), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(cache,)) for cache in caches for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_stored_sizes():
    sizes = np.asarray([[100, 200], [200, 100], [20, 30], [33, 1000]])
    assert stored_sizes_of(sizes, 32).tolist() == [[32, 64], [64, 32], [20, 30], [32, 970]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data.cache_side": 16}, "less than model.image_size 32.*try 37"),
        ({"data.cache_side": 40, "augment.crop_scale": 1.0}, "crop_scale is 1"),
    ],
)
def test_an_impossible_cache_is_refused_before_a_folder_is_made(folder, tmp_path, tiny, given, message):
    with pytest.raises(ValueError, match=message):
        train(folder, out=tmp_path / "run", console=Console(quiet=True), **{**tiny, "model.image_size": 32, **given})
    assert not (tmp_path / "run").exists()


def test_a_training_gives_the_same_weights_from_an_empty_and_from_a_full_cache(
    folder, tmp_path, tiny, monkeypatch, capsys
):
    settings_ = {**tiny, "batch_size": 4, "model.image_size": 32, "data.cache_side": 40, "data.decode": "fast"}
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    whole = train(folder, out=tmp_path / "whole", console=Console(), **settings_)
    assert "training images are cached decoded in" in " ".join(capsys.readouterr().out.split())
    again = train(folder, out=tmp_path / "again", console=Console(quiet=True), **settings_)
    one, other = (load_tensors(each.folder / "model.safetensors")[0] for each in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_small_rotated_images_are_stored_as_they_are(decode, tmp_path, monkeypatch):
    """A rotated image that is not resized is a view with its axes swapped."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    for number in range(16):
        class_folder = tmp_path / "data" / "ab"[number % 2]
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{number:02d}.jpg").write_bytes(jpeg(photo(number, 40, 28), 1 + number // 2))
    config, checked = loaded(tmp_path / "data", decode=decode, cache_side=32)
    data, first = batches(config, checked)
    _, second = batches(config, checked)
    cache = data.reader.cache
    assert cache is not None
    for index in data.splits.indices["train"].tolist():
        np.testing.assert_array_equal(cache.read(index), np.asarray(data.dataset.read(index, "RGB")))
    assert all(torch.equal(one.images, two.images) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_exif_behind_padding_is_found(padding):
    """A marker may be preceded by any number of 0xFF."""
    data = jpeg(photo(0, 40, 20), 6)
    at = data.index(b"\xff\xe1")
    padded = data[:at] + b"\xff" * padding + data[at:]
    header = jpeg_header(padded)
    assert header is None or header.orientation == 6
    assert read_image(padded).size == read_image(data).size == (20, 40)


def test_an_image_of_one_pixel_can_be_cropped_fast(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        photo(0, 1, 1).save(tmp_path / name / "one.png")
    dataset = open_dataset(str(tmp_path))
    for left in (0.0, 0.4, 0.7):
        found = CropReader(8, "bilinear", "RGB", fast=True).read(
            dataset, 0, lambda width, height, left=left: Box(left, left, 0.3, 0.3)
        )
        assert found.shape == (3, 8, 8)
