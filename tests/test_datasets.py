"""Listing of image folders: which files are images, of which class, in which split."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from vitrail.data.datasets.base import ArrayDataset, FileDataset, flip_reason
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.decode import ImageError


def put(path: Path, level: int = 100) -> None:
    """Write a small PNG, whatever the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level, 20, 30)).save(path, "PNG")


def make(root: Path, *names: str) -> Path:
    for level, name in enumerate(names):
        put(root / name, level)
    return root


def opened(root: Path) -> FileDataset:
    dataset = open_dataset(str(root))
    assert isinstance(dataset, FileDataset)
    return dataset


def kinds(dataset: FileDataset) -> list[tuple[str, str]]:
    return [(problem.severity, problem.kind) for problem in dataset.problems]


def test_classes_and_images_are_in_the_order_of_torchvisions_image_folder(tmp_path):
    make(
        tmp_path,
        "10/b.png",
        "10/a10.png",
        "10/a9.png",
        "2/x.png",
        "1/x.png",
        "Zebra/x.JPG",
        "ant/x.png",
        "éclair/x.png",
    )
    ours, theirs = opened(tmp_path), ImageFolder(str(tmp_path))
    assert list(ours.labels) == theirs.classes == ["1", "10", "2", "Zebra", "ant", "éclair"]
    assert [(ours.location(i), int(ours.targets[i])) for i in range(len(ours.paths))] == theirs.imgs
    assert ours.split is None
    assert ours.problems == ()
    assert ours.name == tmp_path.name


def test_nested_folders_belong_to_the_first_level(tmp_path):
    make(tmp_path, "green/apple/1.png", "green/pear/deep/2.png", "red/apple/1.png", "red/3.png")
    ours, theirs = opened(tmp_path), ImageFolder(str(tmp_path))
    assert ours.labels == ("green", "red")
    assert {(ours.location(i), int(ours.targets[i])) for i in range(4)} == set(theirs.imgs)


def test_train_val_test_are_used_as_they_are(tmp_path):
    make(tmp_path, *(f"{split}/{label}/{split}.png" for split in ("train", "val", "test") for label in "ab"))
    dataset = opened(tmp_path)
    assert list(dataset.paths) == [
        f"{split}/{label}/{split}.png" for split in ("train", "val", "test") for label in "ab"
    ]
    assert dataset.split is not None
    assert dataset.split.tolist() == ["train", "train", "val", "val", "test", "test"]
    assert dataset.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.problems == ()


@pytest.mark.parametrize("alias", ["val", "valid", "validation"])
def test_the_validation_split_has_three_names(tmp_path, alias):
    dataset = opened(make(tmp_path, "train/a/1.png", "train/b/1.png", f"{alias}/a/2.png", f"{alias}/b/2.png"))
    assert dataset.split is not None
    assert dict(zip(dataset.paths, dataset.split.tolist(), strict=True)) == {
        "train/a/1.png": "train",
        "train/b/1.png": "train",
        f"{alias}/a/2.png": "val",
        f"{alias}/b/2.png": "val",
    }


def test_two_names_of_one_split_are_refused(tmp_path):
    make(tmp_path, "train/a/1.png", "val/a/2.png", "valid/a/3.png")
    with pytest.raises(ValueError, match=r"val, valid.* same split twice.*keep one folder"):
        opened(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    dataset = opened(make(tmp_path, "plane/1.png", "train/1.png", "test/1.png"))
    assert dataset.labels == ("plane", "test", "train")
    assert dataset.split is None


def test_folders_beside_the_splits_are_named(tmp_path):
    dataset = opened(make(tmp_path, "train/a/1.png", "train/b/1.png", "extra/a/1.png"))
    assert list(dataset.paths) == ["train/a/1.png", "train/b/1.png"]
    assert kinds(dataset) == [("warning", "name")]
    assert dataset.problems[0].paths == ("extra",)


def test_an_unknown_class_of_val_is_refused_with_the_nearest_name(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dogs/2.png")
    with pytest.raises(ValueError, match=r"unknown class 'dogs'; did you mean 'dog'\? Known: cat, dog"):
        opened(tmp_path)


def test_a_class_that_val_lacks_keeps_its_number_and_is_named(tmp_path):
    dataset = opened(make(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/2.png", "val/a/2.png"))
    assert dataset.labels == ("a", "b", "c")
    assert dataset.targets[list(dataset.paths).index("val/c/2.png")] == 2
    assert kinds(dataset) == [("warning", "missing-class")]
    assert "'b'" in dataset.problems[0].message
    assert "val" in dataset.problems[0].message
    assert dataset.problems[0].paths == ("val/b",)  # relative to the dataset, as every problem's


@pytest.mark.parametrize(("prefix", "lacks"), [("", "b"), ("train/", "train/b")])
def test_an_empty_class_is_an_error_where_it_should_be_learnt(tmp_path, prefix, lacks):
    make(tmp_path, f"{prefix}a/1.png", f"{prefix}c/1.png")
    (tmp_path / lacks).mkdir()
    dataset = opened(tmp_path)
    assert dataset.labels == ("a", "b", "c")
    assert dataset.targets.tolist() == [0, 2]
    assert kinds(dataset) == [("error", "missing-class")]
    assert dataset.problems[0].paths == (lacks,)


def test_hidden_files_and_archive_remains_are_ignored(tmp_path):
    make(tmp_path, "a/1.png", "a/.1.png", "a/._1.png", "a/.cache/2.png", ".git/1.png", "__MACOSX/a/1.png", "b/1.png")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"\0" * 20)
    (tmp_path / "a" / "desktop.ini").write_text("[x]")
    dataset = opened(tmp_path)
    assert dataset.labels == ("a", "b")
    assert list(dataset.paths) == ["a/1.png", "b/1.png"]
    assert dataset.problems == ()


def test_files_that_are_no_images_are_skipped_and_named(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "notes.txt").write_text("a text")
    (tmp_path / "a" / "labels").write_bytes(b"")
    dataset = opened(tmp_path)
    assert list(dataset.paths) == ["a/1.png", "b/1.png"]
    assert kinds(dataset) == [("warning", "name")]
    assert dataset.problems[0].paths == ("a/labels", "a/notes.txt")


def test_an_image_without_an_ending_is_listed(tmp_path):
    dataset = opened(make(tmp_path, "a/n01440764_10026", "a/IMG.0001", "b/1.png"))
    assert list(dataset.paths) == ["a/IMG.0001", "a/n01440764_10026", "b/1.png"]
    assert dataset.problems == ()
    assert dataset.read(1, "RGB").getpixel((0, 0)) == (0, 20, 30)


def test_a_broken_file_with_an_image_name_is_listed_for_the_scan_to_find(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "bad.jpg").write_bytes(b"no jpeg")
    dataset = opened(tmp_path)
    assert list(dataset.paths) == ["a/1.png", "a/bad.jpg", "b/1.png"]
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        dataset.read(1, "RGB")


@pytest.mark.parametrize(("prefix", "where"), [("", "stray.png"), ("train/", "train/stray.png")])
def test_images_beside_the_class_folders_are_named(tmp_path, prefix, where):
    dataset = opened(make(tmp_path, f"{prefix}a/1.png", f"{prefix}b/1.png", where))
    assert where not in dataset.paths
    assert kinds(dataset) == [("warning", "name")]
    assert dataset.problems[0].paths == (where,)


def test_links_are_followed_and_loops_end(tmp_path):
    make(tmp_path, "data/a/1.png", "data/b/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a", target_is_directory=True)
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    dataset = opened(tmp_path / "data")
    assert list(dataset.paths) == ["a/1.png", "a/more/2.png", "b/1.png", "c/2.png"]


def test_a_dangling_link_is_listed_when_named_like_an_image_and_skipped_else(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    dataset = opened(tmp_path)
    assert list(dataset.paths) == ["a/1.png", "a/gone.png", "b/1.png"]
    assert dataset.problems[0].paths == ("a/gone",)


def test_a_pipe_in_a_class_folder_is_skipped_and_does_not_hang(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "pipe")
    dataset = opened(tmp_path)
    assert list(dataset.paths) == ["a/1.png", "b/1.png"]
    assert dataset.problems[0].paths == ("a/pipe",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no such folder"),
        ("digit", "did you mean 'digits'"),
        ("file.png", "is a file; expected a folder"),
        ("empty", "no class folders found"),
        ("hollow", "hold no images"),
    ],
)
def test_what_is_no_dataset_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    put(Path("file.png"))
    Path("empty").mkdir()
    Path("hollow/a").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        open_dataset(name)


def test_images_are_read_rotated_and_in_the_requested_mode(tmp_path):
    make(tmp_path, "b/1.png")
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "a").mkdir()
    stored = np.zeros((2, 5, 3), np.uint8)
    stored[0, 0] = 255
    Image.fromarray(stored).save(tmp_path / "a" / "1.png", exif=exif)
    dataset = opened(tmp_path)
    np.testing.assert_array_equal(np.asarray(dataset.read(0, "RGB")), np.rot90(stored, -1))
    assert dataset.read(0, "L").mode == "L"
    assert dataset.location(0) == str(tmp_path / "a" / "1.png")


def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    make(tmp_path, "a/1.png", "b/1.png")
    with pytest.raises(ImageError, match="limit_pixels=11"):
        open_dataset(str(tmp_path), limit_pixels=11).read(0, "RGB")
    assert open_dataset(str(tmp_path), limit_pixels=12).read(0, "RGB").size == (4, 3)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["0", "1", "2"], "single letters or digits"),
        (["a", "B", "7"], "single letters or digits"),
        (["turn_left", "turn_right"], "'turn_left' names a side"),
        (["Left", "front"], "'Left' names a side"),
        (["arm-right", "arm"], "'arm-right' names a side"),
        (["cat", "dog"], ""),
        (["leftover", "copyright"], ""),
        (["a", "cat"], ""),
    ],
)
def test_mirroring_is_refused_where_the_names_forbid_it(labels, reason):
    found = flip_reason(labels)
    assert reason in found
    assert bool(reason) == bool(found)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    dataset = open_dataset("digits")
    assert isinstance(dataset, ArrayDataset)
    assert dataset.labels == tuple("0123456789")
    assert dataset.targets.tolist() == targets.tolist()
    assert len(set(dataset.paths)) == len(dataset.paths) == 1797
    assert dataset.flip_reason
    image = dataset.read(7, "L")
    assert image.size == (8, 8)
    np.testing.assert_allclose(np.asarray(image) / 255, pixels[7].reshape(8, 8) / 16, atol=0.5 / 255)
    np.testing.assert_array_equal(np.asarray(dataset.read(7, "RGB")), np.repeat(np.asarray(image)[..., None], 3, 2))
