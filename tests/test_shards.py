"""Datasets in tar shards: their content, their faults, and that training sees the same images as from files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from shard_files import opened, png, reds, tar, with_cls

from vitrail.data.datasets.open import open_dataset, run_name, same_dataset
from vitrail.data.datasets.webdataset.shards import is_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


# --- what DATA may be


def test_a_range_a_glob_a_folder_and_one_file(tmp_path):
    for number in range(3):
        tar(tmp_path / f"{number:02d}.tar", with_cls(number * 10, number * 10 + 1))
    for name in ("{00..02}.tar", "*.tar", "{00,01,02}.tar", ""):
        dataset = opened(tmp_path / name)
        assert list(dataset.paths) == [f"{shard:02d}/{key:04d}.png" for shard in range(3) for key in range(2)]
        assert (dataset.labels, dataset.targets.tolist()) == (("0", "1"), [0, 1] * 3)
        assert reds(dataset) == [0, 1, 10, 11, 20, 21]
        assert dataset.split is None
        assert dataset.groups is None
        assert dataset.location(3) == f"{tmp_path}/01.tar: 0001.png"
        assert dataset.problems == ()
    assert list(opened(tmp_path / "01.tar").paths) == ["01/0000.png", "01/0001.png"]
    assert opened(f"file://{tmp_path}/01.tar").name == "01.tar"
    tar(tmp_path / "deep" / "01.tar", with_cls(7))
    assert list(opened(tmp_path / "{01,deep/01}.tar").paths)[1:] == ["01/0001.png", "deep/01/0000.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{00..03}.tar", r"2 of 4 shards are missing: .*/02\.tar, .*/03\.tar: no such file; fix the range"),
        ("x.tar", r"/x\.tar: no such file"),
        ("x*.tar", r"x\*\.tar: no file has such a name"),
        ("{00,00}.tar", r"names .*/00\.tar twice"),
        ("{00..01.tar", r"a brace is not closed"),
        ("a.tar.gz", r"a\.tar\.gz: is compressed.*unpack it once to \.tar"),
        ("a.tgz", r"a\.tgz: is compressed"),
    ],
)
def test_names_of_missing_or_compressed_shards(tmp_path, name, message):
    for number in range(2):
        tar(tmp_path / f"{number:02d}.tar", with_cls(1, 2))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "00.tar").read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_dataset(str(tmp_path / name))


def test_addresses_that_are_no_shards():
    with pytest.raises(ValueError, match=r"of addresses, only tars of images are read; expected a name that ends in"):
        open_dataset("https://example.org/images.zip")
    with pytest.raises(ValueError, match=r"ftpx://a/b\.tar: Protocol not known: ftpx; expected http://"):
        open_dataset("ftpx://a/b.tar")


def test_run_names_and_equal_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_name("s3://bucket/birds/train-{00..03}.tar") == "birds"
    assert run_name("https://a.org:80/x/imagenet1k-train-{0000..1023}.tar?download=1") == "imagenet1k"
    assert run_name("hf://datasets/timm/imagenet-1k-wds/imagenet1k-train-{0000..1023}.tar") == "imagenet1k"
    assert run_name("shards/{00..99}.tar") == "shards"
    assert run_name("birds_2024.tar") == "birds_2024"
    assert run_name("{00..99}.tar") == "shards"
    assert run_name("s3://bucket/{00..99}.tar") == "bucket"
    assert same_dataset("a/{0..3}.tar", str(tmp_path / "a" / "{0..3}.tar"))
    assert not same_dataset("s3://a/{0..3}.tar", "s3:/a/{0..3}.tar")
    assert same_dataset("s3://a/x.tar", "s3://a/x.tar")


def test_an_image_folder_with_a_tar_in_it_is_no_folder_of_shards(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=2)
    tar(folder / "backup.tar", with_cls(1))
    assert not is_shards(str(folder))
    assert open_dataset(str(folder)).labels == ("flat", "slant", "steep")


# --- labels, splits, groups


def test_labels_by_json_cls_and_folder(tmp_path):
    def metadata(label: object, **more: object) -> bytes:
        return json.dumps({"label": label, **more}).encode()

    tar(tmp_path / "j.tar", {"a.png": png(1), "a.json": metadata("dog"), "b.json": metadata(7), "b.png": png(2)})
    assert (opened(tmp_path / "j.tar").labels, opened(tmp_path / "j.tar").targets.tolist()) == (("7", "dog"), [1, 0])
    tar(tmp_path / "c.tar", {"a.png": png(1), "a.cls": b" dog\n", "b.png": png(2), "b.cls": b"ant"})
    assert (opened(tmp_path / "c.tar").labels, opened(tmp_path / "c.tar").targets.tolist()) == (("ant", "dog"), [1, 0])
    tar(tmp_path / "f.tar", {"./set/red/apple/1.png": png(1), "./set/green/apple/1.JPG": png(2)})
    dataset = opened(tmp_path / "f.tar")
    assert (dataset.labels, list(dataset.paths)) == (
        ("green", "red"),
        ["f/set/red/apple/1.png", "f/set/green/apple/1.JPG"],
    )
    tar(tmp_path / "p.tar", {"s/train/a/1.png": png(1), "s/train/b/1.png": png(2), "s/valid/a/2.png": png(3)})
    dataset = opened(tmp_path / "p.tar")
    assert dataset.labels == ("a", "b")
    assert dataset.split is not None
    assert dataset.split.tolist() == ["train", "train", "val"]


def test_class_names_beside_the_shards_give_the_order(tmp_path):
    tar(tmp_path / "x-0.tar", with_cls(0, 1))
    tar(tmp_path / "x-1.tar", {"7.png": png(9), "7.cls": b"zebra"})
    (tmp_path / "classes.json").write_text('["zebra", "ant", "bee"]')
    dataset = opened(tmp_path / "x-{0..1}.tar")
    assert (dataset.labels, dataset.targets.tolist()) == (("zebra", "ant", "bee"), [0, 1, 0])
    (tmp_path / "classes.json").write_text('{"classes": ["zebra", "ant"], "flip_reason": "they are signs"}')
    assert opened(tmp_path / "x-{0..1}.tar").flip_reason == "they are signs"
    for text, message in (
        ('["zebra"]', r"x-0\.tar: 0001\.png: class 1 in its \.cls, but classes\.json has 1 names, from 0"),
        ('["ant", "bee"]', r"x-1\.tar: 7\.png: unknown class 'zebra'.*1 images .* classes\.json does not have it"),
        ('["ant", "ant"]', "has the class 'ant' twice"),
        ("[1, 2]", "expected a list of class names"),
        ("{", "is no JSON"),
    ):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "x-{0..1}.tar")


def test_splits_by_name_and_by_json(tmp_path):
    tar(tmp_path / "train-0.tar", with_cls(2, 3))
    tar(tmp_path / "photos-validation-0.tar", with_cls(4, 5))
    tar(tmp_path / "test" / "0.tar", with_cls(6, 7))
    dataset = opened(tmp_path / "{train-0,photos-validation-0,test/0}.tar")
    assert dataset.split is not None
    assert dataset.split.tolist() == ["train", "train", "val", "val", "test", "test"]
    assert dataset.split_origin == "the names of the shards:"
    samples = [("a", "train", "p"), ("b", "Valid", "p"), ("c", "train", 4), ("d", "train", None)]
    files = {}
    for number, (key, split, group) in enumerate(samples):
        metadata = {"label": "xy"[number % 2], "split": split, "group": group}
        files |= {f"{key}.png": png(number), f"{key}.json": json.dumps(metadata).encode()}
    tar(tmp_path / "s.tar", files)
    dataset = opened(tmp_path / "s.tar")
    assert dataset.split is not None
    assert dataset.groups is not None
    assert dataset.split.tolist() == ["train", "val", "train", "train"]
    assert dataset.groups.tolist() == [0, 0, 1, -1]
    assert [(each.kind, each.paths) for each in dataset.problems] == [("leak", ("p",))]


def test_content_that_is_not_read_is_named_once(tmp_path):
    files = {"a.png": png(1), "a.cls": b"0", "a.txt": b"a caption", "a.json": b'{"url": "x", "width": 3}'}
    files |= {
        "b.png": png(2),
        "b.mask.png": png(3),
        "b.cls": b"1",
        "README": b"about",
        "__m__/i.json": b"1",
        ".x.png": b"",
    }
    dataset = opened(tar(tmp_path / "s.tar", files))
    assert [each.message for each in dataset.problems] == [
        "s.tar: not read: .mask.png, .txt, README, __m__, url in .json, width in .json".replace(" __m__,", " i.json,")
    ]
    assert reds(dataset) == [1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"x\.tar: holds no samples; leave it out"),
        ([("a.cls", b"1"), ("b.png", b"")], r"x\.tar: a\.cls: the sample 'a' has no image, but \.cls"),
        (
            [("a.png", b""), ("a.jpg", b""), ("a.cls", b"1")],
            r"a\.png: the sample 'a' has 2 images \(a\.png, a\.jpg\)",
        ),
        ([("a.1.png", b""), ("a.2.png", b""), ("a.cls", b"1")], r"has 2 images .* counts up to its first dot"),
        ([("a.png", b""), ("a.PNG", b"")], r"x\.tar: a\.PNG: is there twice"),
        ([("a.png", b"")], r"x\.tar: a\.png: has no label; expected a\.cls .* a\.json with a label, or a folder"),
        ([("a.png", b""), ("a.json", b'{"caption": "x"}')], r"a\.png: has no label"),
        ([("a.png", b""), ("a.cls", b" ")], r"a\.cls: is empty"),
        ([("a.png", b""), ("a.cls", b"\xff")], r"a\.cls: is not UTF-8"),
        ([("a.png", b""), ("a.cls", b"1" * 2_000_000)], r"a\.cls: has 2,000,000 bytes"),
        ([("a.png", b""), ("a.json", b"{")], r"a\.json: is no JSON"),
        ([("a.png", b""), ("a.json", b"[1]")], r"a\.json: is no object"),
        ([("a.png", b""), ("a.json", b'{"label": 1.5}')], r"a\.png: label 1\.5 in its \.json is neither"),
        ([("a.png", b""), ("a.json", b'{"label": true}')], r"a\.png: label True in its \.json is neither"),
        ([("a.png", b""), ("a.json", b'{"label": "\\ud800"}')], r"a\.png: label .* is no Unicode text"),
        (
            [("a.png", b""), ("a.json", b'{"label": "x", "split": "tran"}')],
            r"unknown split 'tran'; did you mean 'train'",
        ),
        (
            [("a.png", b""), ("a.cls", b"1"), ("b.png", b""), ("b.cls", b"1"), ("a.png", b""), ("a.json", b"{}")],
            r"a\.png: has no label",
        ),
        (
            [("a.png", b""), ("a.cls", b"1"), ("b.png", b""), ("b.cls", b"1"), ("a.png", b""), ("a.cls", b"1")],
            r"a\.png: its key 'a' was there before, .* --sort=name",
        ),
        (
            [("c/a.png", b""), ("c/b.png", b""), ("c/b.cls", b"1")],
            r"c/b\.png: its label is in its \.cls, those of others in their folder",
        ),
        (
            [("a.png", b""), ("a.cls", b"1"), ("a.json", b'{"label": "x"}')]
            + [("b.png", b""), ("b.cls", b"1"), ("b.json", b'{"label": "y"}')],
            r"b\.png: its \.cls says 1 \('x'\), its \.json 'y'; fix one",
        ),
        ([("../a.png", b""), ("../a.cls", b"1")], r"\.\./a\.png: leads out of the shard"),
        (
            [
                ("a.png", b""),
                ("a.json", b'{"label": "x", "split": "val"}'),
                ("b.png", b""),
                ("b.json", b'{"label": "x"}'),
            ],
            r"b\.png: has no split, as others have; write a split in each",
        ),
        (
            [("a.png", b""), ("a.json", b'{"label": "x", "split": "val"}')]
            + [("b.png", b""), ("b.json", b'{"label": "y", "split": "train"}')],
            r"a\.png: unknown class 'x'.*no image of train is of it",
        ),
    ],
)
def test_faults_of_a_sample_are_named_by_shard_and_member(tmp_path, files, message):
    path = tar(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(str(path))
    assert str(caught.value).startswith(str(path))


def test_shards_that_contradict_each_other(tmp_path):
    tar(tmp_path / "train-0.tar", with_cls(2, 3))
    tar(tmp_path / "a-0.tar", with_cls(4, 5))
    with pytest.raises(ValueError, match=r"a-0\.tar: 0000\.png: has no split, as others have"):
        opened(tmp_path / "{train,a}-0.tar")
    tar(tmp_path / "test-0.tar", {"a.png": png(1), "a.json": b'{"label": "x", "split": "train"}'})
    with pytest.raises(ValueError, match=r"test-0\.tar: a\.png: is of train, but the name of its shard says test"):
        opened(tmp_path / "test-0.tar")
    tar(tmp_path / "train-val-0.tar", with_cls(1))
    with pytest.raises(ValueError, match=r"its name has the splits train and val; rename it"):
        opened(tmp_path / "train-val-0.tar")
    for folder, names in (("p", '["0", "1"]'), ("q", '["1", "0"]')):
        tar(tmp_path / folder / "x.tar", with_cls(1, 2))
        (tmp_path / folder / "classes.json").write_text(names)
    with pytest.raises(ValueError, match=r"p/classes\.json and .*q/classes\.json: are not the same"):
        opened(tmp_path / "{p,q}" / "x.tar")


def test_a_missing_number_in_a_folder_of_shards_is_warned_of(tmp_path):
    for number in (0, 2, 3, 6):
        tar(tmp_path / f"train-{number:03d}.tar", with_cls(number, 10 + number))
    [problem] = opened(tmp_path).problems
    assert [Path(path).name for path in problem.paths] == ["train-001.tar", "train-004.tar", "train-005.tar"]
    assert "are missing: are images lost?" in problem.message
    assert opened(tmp_path / "train-{000,002,003,006}.tar").problems == ()
    (tmp_path / "train-000.tar").unlink()
    (tmp_path / "train-006.tar").unlink()
    assert opened(tmp_path).problems == ()
