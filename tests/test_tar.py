"""Tars as shards: their members, faults in the file, changes while it is read, and the cached index."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_files import opened, png, reds, tar, with_cls

from vitrail.cli import run
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.webdataset.tar import TarReader
from vitrail.data.images.decode import ImageError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


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
