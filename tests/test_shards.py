"""Datasets in tar shards: their content, their faults, and that training sees the same images as from files."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.cli import run
from vitrail.config import AugmentConfig, DataConfig
from vitrail.data.check.scan import scan_dataset
from vitrail.data.datasets.base import Dataset, TarDataset
from vitrail.data.datasets.open import open_dataset, run_name, same_dataset
from vitrail.data.datasets.webdataset.shards import is_shards
from vitrail.data.datasets.webdataset.tar import TarReader
from vitrail.data.datasets.write_shards import write_shards
from vitrail.data.images.decode import ImageError
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.train_loader import ImageReader, TrainLoader
from vitrail.data.splits.splits import split_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


def png(level: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (5, 4), (level, 20, 30)).save(file, "PNG")
        return file.getvalue()


def tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def with_cls(*levels: int, first: int = 0) -> dict[str, bytes]:
    """Return samples of two classes by number, whose images have these levels of red."""
    files = {}
    for number, level in enumerate(levels, first):
        files |= {f"{number:04d}.png": png(level), f"{number:04d}.cls": str(level % 2).encode()}
    return files


def opened(location: object) -> TarDataset:
    dataset = open_dataset(str(location))
    assert isinstance(dataset, TarDataset)
    return dataset


def reds(dataset: TarDataset) -> list[int]:
    return [dataset.read(index, "RGB").getpixel((0, 0))[0] for index in range(len(dataset.paths))]


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
        ("{00..03}.tar", r"2 of 4 shards are missing: .*/02\.tar, .*/03\.tar: no such file; mend the range"),
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
            r"b\.png: its \.cls says 1 \('x'\), its \.json 'y'; mend one",
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


# --- tars


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=160),
            st.binary(max_size=1500),
        ),
        max_size=6,
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_what_tarfile_finds(tmp_path_factory, files, form):
    path = tmp_path_factory.getbasetemp() / "members.tar"
    files = [
        (f"d/{name}.x", content) for name, content in files if len(name.encode()) < 90 or form != tarfile.USTAR_FORMAT
    ]
    tar(path, files, form)
    with TarReader(path, "t") as reader, tarfile.open(path) as archive:
        found = [(each.name, each.start, each.size) for each in reader.members()]
        assert found == [(each.name, each.offset_data, each.size) for each in archive]
        assert [reader.read(start, size) for _, start, size in found] == [content for _, content in files]


def test_sizes_above_8_gb_and_long_names_in_the_form_of_each_program(tmp_path):
    """Headers are made by tarfile; the 9 GB are a hole in the file."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        big, small = tarfile.TarInfo("big.bin"), tarfile.TarInfo("é" * 200 + "/a.png")
        big.size, small.size = 9 * 2**30, 3
        with path.open("wb") as file:
            file.write(big.tobuf(form))
            file.seek(big.size, os.SEEK_CUR)
            file.write(small.tobuf(form) + b"abc".ljust(512, b"\0") + bytes(1024))
        with TarReader(path, "t") as reader:
            assert [(each.name, each.size) for each in reader.members()] == [(big.name, big.size), (small.name, 3)]


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    contents = {
        "cut in an image": whole[:550],
        "cut in a header": whole[: 1024 + 100],
        "cut between": whole[:2048],
        "damaged": whole[:1030] + b"?" + whole[1031:],
        "joined by cat": whole + whole,
        "gzip": gzip.compress(whole),
        "text": b"I am a text. " * 200,
        "short": b"x",
        "nothing": b"",
    }
    path.write_bytes(contents[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut in an image", r"x\.tar: is cut short: '0000\.png' should end at byte .*, but the file has 550"),
        (
            "cut in a header",
            r"x\.tar: is cut short: it ends after '0000\.png', at byte 1,124, without a tar's end mark",
        ),
        ("cut between", r"x\.tar: is cut short: it ends after '0000\.cls', at byte 2,048, without a tar's end mark"),
        ("damaged", r"x\.tar: is damaged at byte 1,024, after '0000\.png'"),
        ("joined by cat", r"x\.tar: goes on after its end mark, as tars do that were joined by cat"),
        ("gzip", r"x\.tar: is compressed, .* unpack it once \(gunzip\)"),
        ("text", r"x\.tar: is no tar \(no header of one at the beginning of its 2,600 bytes\)"),
        ("short", r"x\.tar: is no tar \(.* of its 1 bytes\)"),
        ("nothing", r"x\.tar: is no tar \(.* of its 0 bytes\)"),
    ],
)
def test_tars_that_are_not_whole(tmp_path, how, message):
    path = tar(tmp_path / "x.tar", with_cls(1, 2, 3))
    damage(path, how)
    with pytest.raises(ValueError, match=message):
        open_dataset(str(path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, r"x\.tar: 'a\.png' is a link; only plain files .* --dereference --hard-dereference"),
        (tarfile.LNKTYPE, r"'a\.png' is a hard link"),
        (tarfile.CHRTYPE, r"'a\.png' is a device"),
        (tarfile.FIFOTYPE, r"'a\.png' is a pipe"),
        (tarfile.GNUTYPE_SPARSE, r"'a\.png' is a sparse file"),
        (b"?", r"'a\.png' is of the unknown kind"),
    ],
)
def test_links_and_devices_are_refused_and_folders_left_alone(tmp_path, kind, message):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("c/b.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
    assert list(opened(tmp_path / "x.tar").paths) == ["x/c/b.png"]
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "x.tar")


def test_a_broken_image_is_named_by_shard_and_member(tmp_path, capsys):
    files = with_cls(*range(30)) | {"bad.png": png(1)[:40], "bad.cls": b"0"}
    tar(tmp_path / "x.tar", files)
    dataset = opened(tmp_path / "x.tar")
    with pytest.raises(ImageError, match=r"x\.tar: bad\.png: unreadable"):
        dataset.read(30, "RGB")
    assert run(["train", str(tmp_path / "x.tar"), "--out", str(tmp_path / "run")]) == 1
    output = " ".join(capsys.readouterr().err.split())
    assert "x.tar: bad.png: unreadable" in output
    assert "--data.damaged drop" in output


def test_a_shard_that_is_changed_while_it_is_read_gives_no_other_image(tmp_path):
    path = tar(tmp_path / "x.tar", with_cls(1, 2))
    dataset = opened(path)
    key = dataset.identity(1)
    tar(path, with_cls(1, 3, 5))
    with pytest.raises(ValueError, match=r"x\.tar: was changed after it was listed; start again"):
        dataset.read(1, "RGB")
    changed = opened(path)
    assert reds(changed) == [1, 3, 5]
    assert changed.identity(1) != key


def test_the_second_opening_reads_the_cached_index_and_a_broken_one_is_rebuilt(tmp_path, cache):
    path = tar(tmp_path / "x.tar", with_cls(1, 2) | {"é/z.png": png(9), "é/z.cls": b"1", "é/z.txt": b""})
    first = opened(path)
    (cached,) = (cache / "listings" / "shards").iterdir()
    written = cached.read_bytes()
    stamp = cached.stat().st_mtime_ns
    for content in (written, written[:-1], b"", bytes([written[0] ^ 1]) + written[1:]):
        cached.write_bytes(content)
        again = opened(path)
        assert list(again.paths) == list(first.paths) == ["x/0000.png", "x/0001.png", "x/é/z.png"]
        assert (again.targets.tolist(), again.starts.tolist()) == (first.targets.tolist(), first.starts.tolist())
        assert (again.labels, again.problems) == (first.labels, first.problems)
        assert cached.read_bytes() == written
    assert cached.stat().st_mtime_ns != stamp


# --- training


def sizes_of(dataset: Dataset) -> np.ndarray:
    """Return the height and width of every image, as the scan finds them."""
    return np.asarray([dataset.read(index, "RGB").size[::-1] for index in range(len(dataset.paths))])


def loader(dataset: TarDataset, *, workers: int, rank: int = 0, ranks: int = 1) -> TrainLoader:
    reader = ImageReader(
        dataset, dataset.targets, Preprocess(image_size=16), None, workers=workers, sizes=sizes_of(dataset)
    )
    indices = np.arange(len(dataset.paths))
    return TrainLoader(
        reader, indices, batch_size=8, seed=3, augment=AugmentConfig(crop_scale=0.5), device=torch.device("cpu"),
        rank=rank, ranks=ranks,
    )  # fmt: skip


def test_order_and_crops_are_the_same_for_any_workers_ranks_and_after_resume(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=12, side=24)
    write_shards(DataConfig(source=str(folder)), tmp_path / "out", size=5)
    dataset = opened(tmp_path / "out")
    whole = list(loader(dataset, workers=1).batches(0, 7))
    for workers in (0, 2, 4):
        again = list(loader(dataset, workers=workers).batches(0, 7))
        assert all(torch.equal(one.images, other.images) for one, other in zip(whole, again, strict=True))
        assert all((one.indices == other.indices).all() for one, other in zip(whole, again, strict=True))
    resumed = list(loader(opened(tmp_path / "out"), workers=2).batches(4, 7))
    assert all(torch.equal(one.images, other.images) for one, other in zip(whole[4:], resumed, strict=True))
    ranks = [list(loader(dataset, workers=2, rank=rank, ranks=2).batches(0, 7)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([ranks[0][step].images, ranks[1][step].images]), batch.images)
        assert torch.equal(torch.cat([ranks[0][step].targets, ranks[1][step].targets]), batch.targets)


def test_training_sees_the_folders_own_images_bit_for_bit(make_folder, tmp_path):
    """In the folder's order, the shards' images make the very batches that the folder makes."""
    folder = open_dataset(str(make_folder(tmp_path / "shapes", count=12, side=24)))
    write_shards(DataConfig(source=str(tmp_path / "shapes")), tmp_path / "out", size=5)
    shards = opened(tmp_path / "out")
    original = [metadata["path"] for metadata in metadata_of(tmp_path / "out")]
    order = np.argsort([list(folder.paths).index(path) for path in original])
    assert [original[index] for index in order] == list(folder.paths)
    assert original != list(folder.paths), "the order was to be shuffled"
    everything = np.arange(len(folder.paths))
    batches = []
    for dataset, chosen in ((folder, everything), (shards, order)):
        reader = ImageReader(
            dataset, dataset.targets, Preprocess(image_size=16), None, workers=2, sizes=sizes_of(dataset)
        )
        augment = AugmentConfig(crop_scale=0.5)
        train_loader = TrainLoader(reader, chosen, batch_size=8, seed=3, augment=augment, device=torch.device("cpu"))
        batches.append(list(train_loader.batches(0, 6)))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def metadata_of(folder: Path) -> list[dict]:
    """Return the content of each .json in a folder of shards, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found += [json.load(archive.extractfile(each)) for each in archive if each.name.endswith(".json")]
    return found


@pytest.mark.slow
def test_train_eval_probe_check_and_resume_on_shards(make_folder, tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "shapes", count=12)
    monkeypatch.chdir(tmp_path)
    assert run(["shard", str(folder), "shards", "--size", "10"]) == 0
    assert "next: vitrail train shards" in " ".join(capsys.readouterr().out.split())
    data = "shards/pictures-{000000..000003}.tar"
    sizes = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    assert run(["train", data, *sizes, "--epochs", "2", "--batch-size", "16"]) == 0
    assert (tmp_path / "runs" / "pictures" / "model.safetensors").exists()
    assert "3 classes; 30 train, 6 val" in capsys.readouterr().out
    assert run(["eval", "runs/pictures", data, "--out", "e.json"]) == 0
    evaluated, own = (json.loads(Path(path).read_text()) for path in ("e.json", "runs/pictures/evaluation.json"))
    assert evaluated["confusion"] == own["val"]["confusion"]
    for computed in (36, 0):
        assert run(["probe", "runs/pictures", data, "--out", "p.json"]) == 0
        assert json.loads(Path("p.json").read_text())["computed"] == computed
    for quick in ([], ["--quick"]):
        assert run(["check", "shards", "--out", "c.json", *quick]) == 0
        checked = json.loads(Path("c.json").read_text())
        assert (checked["num_images"], checked["num_good"], checked["formats"]) == (36, 36, {"PNG": 36})


def test_a_dataset_with_splits_and_groups_keeps_them(tmp_path):
    lines = ["path,label,split,group"]
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(
            f"{number}.png,{'ab'[number % 2]},{'train' if number < 16 else 'val'},{number // 4 if number % 8 else ''}"
        )
    (tmp_path / "t.csv").write_text("\n".join(lines))
    table = open_dataset(str(tmp_path / "t.csv"))
    written = write_shards(DataConfig(source=str(tmp_path / "t.csv")), tmp_path / "out", size=10, seed=1)
    assert written.names == ("train-000000.tar", "train-000001.tar", "val-000000.tar")
    assert written.counts == {"train": 16, "val": 8}
    shards = opened(tmp_path / "out")
    assert table.split is not None and shards.split is not None
    assert table.groups is not None and shards.groups is not None
    assert shards.labels == table.labels
    original = np.asarray([list(table.paths).index(metadata["path"]) for metadata in metadata_of(tmp_path / "out")])
    assert (shards.split == table.split[original]).all()
    assert (shards.targets == table.targets[original]).all()
    ours, theirs = shards.groups, table.groups[original]
    assert ((ours[:, None] == ours) == (theirs[:, None] == theirs)).all()
    assert ((ours < 0) == (theirs < 0)).all()
    scan = scan_dataset(shards, damaged="stop", near_duplicates=False, memory_bytes=0, workers=1)
    assert split_dataset(shards, DataConfig(), scan.good, scan.groups).rule == "the split in .json: train, val"


# --- with the webdataset library


def test_webdataset_reads_what_shard_writes(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=5)
    written = write_shards(DataConfig(source=str(folder)), tmp_path / "out", size=4)
    urls = [str(tmp_path / "out" / name) for name in written.names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls", "json"))
        gc.collect()
    assert len(samples) == 15
    labels = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    for image, number, metadata in samples:
        assert labels[number] == metadata["label"]
        assert metadata["path"].startswith(f"{metadata['label']}/")
        assert (np.asarray(image) == np.asarray(Image.open(folder / metadata["path"]).convert("RGB"))).all()


def test_shards_of_webdatasets_own_writers(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write(
                {"__key__": f"part.{number}"[5:].rjust(5, "0"), "png": png(number), "cls": number % 2, "txt": "a"}
            )
    dataset = opened(tmp_path / "w-{000000..000002}.tar")
    assert reds(dataset) == list(range(7))
    assert dataset.targets.tolist() == [number % 2 for number in range(7)]
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        for number in range(3):
            writer.write(
                {
                    "__key__": f"a/{number}",
                    "jpg": np.full((8, 8, 3), number * 40, np.uint8),
                    "json": {"label": "ab"[number % 2]},
                }
            )
    dataset = opened(tmp_path / "t.tar")
    assert dataset.labels == ("a", "b")
    assert [dataset.read(index, "L").getpixel((0, 0)) for index in range(3)] == [0, 40, 80]


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
