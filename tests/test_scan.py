"""The look at every image: broken files, duplicates, and pixels that stay in memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.cache.scans import THUMBNAIL
from vitrail.data.check.duplicates import candidate_pairs, duplicate_pairs, hashes
from vitrail.data.check.scan import Scan, ScanSettings, has_colour, scan_dataset
from vitrail.data.datasets.base import Dataset
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.decode import read_image
from vitrail.data.setup import load_data
from vitrail.data.splits.splits import save_splits
from vitrail.threads import ordered_map


def photo(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """A smooth colour image, another for each seed, the same scene at every size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def put(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(root: Path, labels: str = "ab", count: int = 4, **size: int) -> Path:
    """`count` different images in each of some class folders."""
    for number, label in enumerate(labels):
        for each in range(count):
            put(root / label / f"{each}.png", photo(100 * number + each, **size))
    return root


def scanned(root: Path, *, damaged: str = "stop", memory_bytes: int = 10**9, **options) -> tuple[Dataset, Scan]:
    source = open_dataset(str(root), keep_damaged=damaged == "keep")
    advance = options.pop("advance", lambda done, total: None)
    return source, scan_dataset(source, how(damaged=damaged, memory_bytes=memory_bytes, **options), advance=advance)


def how(**options) -> ScanSettings:
    given = {"damaged": "stop", "near_duplicates": True, "limit_pixels": 100_000_000, "workers": 2}
    return ScanSettings(**{**given, **options})


def lost(source: Dataset, scan: Scan) -> set[str]:
    return {path for path, good in zip(source.paths, scan.good, strict=True) if not good}


def found(scan: Scan) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(problem.severity, problem.kind, problem.paths) for problem in scan.problems]


@pytest.mark.parametrize(("channels", "mode"), [(0, "RGB"), (3, "RGB"), (1, "L")])
def test_pixels_in_memory_are_the_decoded_files(tmp_path, channels, mode):
    source, scan = scanned(fill(tmp_path), channels=channels)
    assert scan.pixels is not None
    assert scan.colour == (mode == "RGB")
    for index in range(len(source.paths)):
        pixels = np.asarray(read_image(source.location(index), mode=mode))
        np.testing.assert_array_equal(scan.pixels[index], pixels[None] if mode == "L" else pixels.transpose(2, 0, 1))
    assert scan.good.all()
    assert scan.sizes.tolist() == [[32, 48]] * 8
    assert scan.problems == ()
    assert len(set(scan.groups)) == 8


def test_grey_is_chosen_when_every_image_is_grey(tmp_path):
    for number in range(6):
        put(tmp_path / "ab"[number % 2] / f"{number}.png", photo(number).convert("L").convert("RGB"))
    source, scan = scanned(tmp_path)
    assert not has_colour(source, how())
    assert not scan.colour
    assert scan.pixels is not None
    assert scan.pixels.shape == (6, 1, 32, 48)
    put(tmp_path / "b" / "colour.png", photo(9))
    source, scan = scanned(tmp_path)
    assert has_colour(source, how())
    assert scan.colour


def test_sizes_are_those_of_turned_images(tmp_path):
    fill(tmp_path)
    exif = Image.Exif()
    exif[274] = 8
    put(tmp_path / "a" / "turned.png", photo(50), exif=exif)
    source, scan = scanned(tmp_path)
    assert scan.sizes[list(source.paths).index("a/turned.png")].tolist() == [48, 32]
    assert scan.pixels is None  # of another size than the rest


def test_images_of_several_sizes_stay_on_disk(tmp_path):
    fill(tmp_path)
    put(tmp_path / "b" / "z.png", photo(50, 48, 33))
    assert scanned(tmp_path)[1].pixels is None


def test_large_images_stay_on_disk(tmp_path):
    assert scanned(fill(tmp_path / "fits", count=1, width=256, height=8))[1].pixels is not None
    assert scanned(fill(tmp_path / "large", count=1, width=257, height=8))[1].pixels is None


def test_the_memory_limit_is_kept_to_the_byte(tmp_path):
    fill(tmp_path)
    needed = 8 * 3 * 32 * 48
    assert scanned(tmp_path, memory_bytes=needed)[1].pixels is not None
    assert scanned(tmp_path, memory_bytes=needed - 1)[1].pixels is None
    assert scanned(tmp_path, memory_bytes=0)[1].pixels is None


def break_some(root: Path) -> None:
    """One file of nonsense, one JPEG cut in half, one link to nowhere."""
    fill(root)
    (root / "a" / "nonsense.jpg").write_bytes(b"this is no image")
    buffer = io.BytesIO()
    photo(60, 128, 128).resize((48, 32)).save(buffer, "JPEG", quality=95)
    (root / "b" / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3])
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")


@pytest.mark.parametrize(("damaged", "severity"), [("stop", "error"), ("drop", "warning")])
def test_broken_files_are_named_and_left_out(tmp_path, damaged, severity):
    break_some(tmp_path)
    source, scan = scanned(tmp_path, damaged=damaged)
    assert lost(source, scan) == {"a/nonsense.jpg", "b/cut.jpg", "b/gone.png"}
    assert found(scan) == [
        (severity, "unreadable", ("a/nonsense.jpg",)),
        (severity, "damaged", ("b/cut.jpg",)),
        (severity, "unreadable", ("b/gone.png",)),
    ]
    for problem in scan.problems:
        assert str(tmp_path / problem.paths[0]) in problem.message
    assert scan.sizes[~scan.good].tolist() == [[0, 0]] * 3
    assert len(set(scan.groups)) == len(source.paths)  # broken files are nobody's duplicates


def test_a_damaged_file_is_kept_when_asked_and_still_named(tmp_path):
    break_some(tmp_path)
    source, scan = scanned(tmp_path, damaged="keep")
    assert lost(source, scan) == {"a/nonsense.jpg", "b/gone.png"}
    assert found(scan) == [
        ("warning", "unreadable", ("a/nonsense.jpg",)),
        ("warning", "damaged", ("b/cut.jpg",)),
        ("warning", "unreadable", ("b/gone.png",)),
    ]
    place = list(source.paths).index("b/cut.jpg")
    assert scan.pixels is not None
    kept = np.asarray(read_image(source.location(place), damaged="keep"))
    np.testing.assert_array_equal(scan.pixels[place], kept.transpose(2, 0, 1))


def test_images_of_too_many_pixels_are_refused_by_name(tmp_path):
    fill(tmp_path)
    put(tmp_path / "a" / "huge.png", photo(70, 60, 60))
    source = open_dataset(str(tmp_path), limit_pixels=48 * 32)
    scan = scan_dataset(source, how(damaged="drop", limit_pixels=source.limit_pixels, memory_bytes=10**9, workers=1))
    assert found(scan) == [("warning", "refused", ("a/huge.png",))]


def test_checking_data_stops_at_broken_files_and_tells_all(tmp_path):
    break_some(tmp_path)
    console = Console(quiet=True)
    with pytest.raises(ValueError, match=r"nonsense\.jpg") as caught:
        load_data(DataConfig(source=str(tmp_path)), console)
    assert "cut.jpg" in str(caught.value)
    assert "gone.png" in str(caught.value)
    checked = load_data(DataConfig(source=str(tmp_path), damaged="drop"), console)
    divided = np.concatenate(list(checked.splits.indices.values()))
    assert sorted(divided.tolist()) == np.flatnonzero(checked.scan.good).tolist()
    assert {problem.kind for problem in checked.problems} == {"unreadable", "damaged", "small-class"}


def test_a_data_set_of_broken_files_alone_is_named_too(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a/x\.jpg(.|\n)*b/x\.jpg"):
        load_data(DataConfig(source=str(tmp_path)), Console(quiet=True))
    with pytest.raises(ValueError, match="no images to train on for 2 classes: a, b"):
        load_data(DataConfig(source=str(tmp_path), damaged="drop"), Console(quiet=True))


def test_a_recorded_split_refuses_a_image_that_broke_since(tmp_path):
    """Its place in memory is empty: trained on, it would be a black image."""
    fill(tmp_path / "data")
    config, console = DataConfig(source=str(tmp_path / "data"), damaged="drop"), Console(quiet=True)
    checked = load_data(config, console)
    save_splits(checked.dataset, checked.splits, tmp_path / "split.json")
    again = load_data(config, console, recorded=tmp_path / "split.json")
    assert again.splits.fingerprint == checked.splits.fingerprint
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"broken since")
    with pytest.raises(ValueError, match=r"broken now, for instance a/0\.png"):
        load_data(config, console, recorded=tmp_path / "split.json")


def test_exact_duplicates_are_found_whatever_their_format(tmp_path):
    fill(tmp_path)
    put(tmp_path / "a" / "copy.bmp", photo(0))
    put(tmp_path / "a" / "copy2.tif", photo(0))
    source, scan = scanned(tmp_path, near_duplicates=False)
    assert found(scan) == [("warning", "duplicate", ("a/0.png", "a/copy.bmp", "a/0.png", "a/copy2.tif"))]
    names = list(source.paths)
    assert len({int(scan.groups[names.index(each)]) for each in ("a/0.png", "a/copy.bmp", "a/copy2.tif")}) == 1
    assert len(set(scan.groups)) == 8


@pytest.mark.parametrize("change", ["jpeg", "half", "double", "brighter"])
def test_near_duplicates_are_found(tmp_path, change):
    fill(tmp_path, width=96, height=64)
    original = photo(0, 96, 64)
    copies = {
        "jpeg": lambda: put(tmp_path / "a" / "copy.jpg", original, quality=75),
        "half": lambda: put(tmp_path / "a" / "copy.png", original.resize((48, 32), Image.Resampling.LANCZOS)),
        "double": lambda: put(tmp_path / "a" / "copy.png", original.resize((192, 128), Image.Resampling.BICUBIC)),
        "brighter": lambda: put(
            tmp_path / "a" / "copy.png", Image.fromarray(np.minimum(np.asarray(original), 253) + 2)
        ),
    }
    copy = copies[change]().relative_to(tmp_path).as_posix()
    source, scan = scanned(tmp_path)
    assert found(scan) == [("warning", "near-duplicate", ("a/0.png", copy))]
    names = list(source.paths)
    assert scan.groups[names.index("a/0.png")] == scan.groups[names.index(copy)]
    assert len(set(scan.groups)) == 8
    assert scanned(tmp_path, near_duplicates=False)[1].problems == ()


def test_different_images_are_no_duplicates(tmp_path):
    source, scan = scanned(fill(tmp_path, "abcd", count=15, width=24, height=24))
    assert scan.problems == ()
    assert len(set(scan.groups)) == len(source.paths) == 60


def test_images_of_equal_bytes_and_another_shape_are_not_equal(tmp_path):
    for label, size in (("a", (40, 20)), ("b", (20, 40))):
        put(tmp_path / label / "flat.png", Image.new("RGB", size, (90, 90, 90)))
    assert scanned(tmp_path, near_duplicates=False)[1].problems == ()


@pytest.mark.parametrize(("levels", "every", "near"), [(2, 1, True), (5, 1, False), (12, 4, True), (24, 4, False)])
def test_near_duplicates_differ_little_everywhere(levels, every, near):
    """A small difference of all pixels counts, and so does a large one of a few."""
    first = np.asarray(photo(3, THUMBNAIL, THUMBNAIL).convert("L")) // 2 + 40
    second = first.copy()
    second[::every, ::every] += np.uint8(levels)
    assert np.bitwise_count(hashes(first[None]) ^ hashes(second[None]))[0] <= 3
    pairs = duplicate_pairs(np.stack([first, second]), np.asarray([1, 2], np.uint64))[1]
    assert pairs.tolist() == ([[0, 1]] if near else [])


def test_a_changed_detail_makes_another_image(tmp_path):
    fill(tmp_path)
    changed = np.asarray(photo(0)).copy()
    changed[8:20, 20:32] = 255 - changed[8:20, 20:32]
    put(tmp_path / "a" / "changed.png", Image.fromarray(changed))
    assert scanned(tmp_path)[1].problems == ()


def test_one_image_in_two_classes_is_a_conflict(tmp_path):
    fill(tmp_path)
    put(tmp_path / "b" / "copy.png", photo(1))
    put(tmp_path / "b" / "like.jpg", photo(2), quality=80)
    scan = scanned(tmp_path)[1]
    assert found(scan) == [
        ("warning", "label-conflict", ("a/1.png", "b/copy.png")),
        ("warning", "label-conflict", ("a/2.png", "b/like.jpg")),
    ]
    assert "a/1.png and b/copy.png" in scan.problems[0].message


def test_one_image_in_two_parts_is_a_leak(tmp_path):
    fill(tmp_path / "train")
    put(tmp_path / "val" / "a" / "new.png", photo(500))
    put(tmp_path / "val" / "b" / "new.png", photo(501))
    put(tmp_path / "val" / "a" / "seen.png", photo(3))
    put(tmp_path / "val" / "a" / "mislabelled.png", photo(100))
    assert found(scanned(tmp_path)[1]) == [
        ("warning", "label-conflict", ("train/b/0.png", "val/a/mislabelled.png")),
        ("warning", "leak", ("train/b/0.png", "val/a/mislabelled.png", "train/a/3.png", "val/a/seen.png")),
    ]


def test_duplicates_stay_on_one_side_of_the_split(tmp_path):
    fill(tmp_path, count=6)
    for number in range(6):
        put(tmp_path / "a" / f"{number}.jpg", photo(number), quality=90)
    for seed in range(4):
        checked = load_data(DataConfig(source=str(tmp_path), split_seed=seed, val_fraction=0.3), Console(quiet=True))
        sides = {part: set(checked.scan.groups[indices]) for part, indices in checked.splits.indices.items()}
        assert not sides["train"] & sides["val"]


def test_k_equal_images_are_k_minus_one_pairs_with_the_first():
    thumbnails = np.random.default_rng(0).integers(0, 256, (6, THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    exact, near = duplicate_pairs(thumbnails, np.asarray([7, 3, 7, 3, 9, 7], dtype=np.uint64))
    assert exact.tolist() == [[0, 2], [1, 3], [0, 5]]
    assert near.tolist() == []


def test_every_pair_of_hashes_within_three_bits_is_a_candidate():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    for place in range(40, 60):  # twenty codes that differ from an earlier one in 0 to 4 bits
        bits = rng.choice(64, place % 5, replace=False).astype(np.uint64)
        codes[place] = codes[place - 40] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    pairs = {tuple(pair) for part in candidate_pairs(codes) for pair in part.tolist()}
    distance = np.bitwise_count(codes[:, None] ^ codes[None])
    wanted = {(i, j) for i in range(60) for j in range(i + 1, 60) if distance[i, j] <= 3}
    assert pairs == wanted
    assert len(wanted) == 16


def test_the_hash_ignores_brightness_and_contrast():
    grey = np.asarray(photo(5, THUMBNAIL, THUMBNAIL).convert("L"))
    softer = (grey * 0.5 + 40).astype(np.uint8)
    other = np.asarray(photo(6, THUMBNAIL, THUMBNAIL).convert("L"))
    one, same, different = hashes(np.stack([grey, softer, other]))
    assert np.bitwise_count(one ^ same) <= 3
    assert np.bitwise_count(one ^ different) > 10


def test_an_empty_and_a_single_image_have_no_pairs():
    for count in (0, 1):
        exact, near = duplicate_pairs(np.zeros((count, THUMBNAIL, THUMBNAIL), np.uint8), np.zeros(count, np.uint64))
        assert exact.shape == near.shape == (0, 2)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 700])
def test_ordered_map_keeps_the_order(workers, count):
    assert list(ordered_map(lambda number: number * number, range(count), workers)) == [n * n for n in range(count)]


def test_ordered_map_hands_on_an_exception():
    def fails_at_fifty(number: int) -> int:
        if number == 50:
            raise KeyError(number)
        return number

    results = ordered_map(fails_at_fifty, range(500), 2)
    seen = [next(results) for _ in range(32)]
    with pytest.raises(KeyError, match="50"):
        next(results)
    assert seen == list(range(32))  # the run before the one that failed


def test_ordered_map_keeps_a_bounded_number_in_flight():
    started = []
    results = ordered_map(lambda number: started.append(number) or number, range(5000), 2)
    assert next(results) == 0
    del results  # closes it, which waits for what was started
    assert len(started) <= (2 * 2 + 1) * 32


def test_progress_ends_with_everything_done(tmp_path):
    told = []
    scanned(fill(tmp_path), advance=lambda done, total: told.append((done, total)))
    assert told == [(0, 8), (8, 8)]


def test_scanning_does_not_depend_on_the_number_of_workers(tmp_path):
    break_some(tmp_path)
    one, two = (scanned(tmp_path, damaged="drop", workers=workers, fresh=True)[1] for workers in (1, 3))
    assert one.problems == two.problems
    assert one.pixels is not None
    np.testing.assert_array_equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.groups, two.groups)
