"""`vitrail shard`: what it writes, that equal input gives equal bytes, and that nothing half written stays."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.cli import run
from vitrail.config import DataConfig
from vitrail.data.datasets import write_shards as writing
from vitrail.data.datasets.base import ArrayDataset
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.write_shards import write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))


def output(capsys) -> str:
    out, error = capsys.readouterr()
    return " ".join((out + error).split())


def members(folder: Path) -> dict[str, bytes]:
    """Return every file in the shards of a folder, by shard and name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for each in archive:
                assert (each.mtime, each.uid, each.gid, each.uname, each.mode) == (0, 0, 0, "", 0o644)
                found[f"{path.stem}/{each.name}"] = archive.extractfile(each).read()
    return found


@pytest.fixture
def photos(tmp_path) -> Path:
    """Train and val folders of two classes, in four formats, one JPEG without an ending."""
    pixels = np.random.default_rng(0)
    for number, (name, file_format) in enumerate(
        [
            ("train/cat/a.jpg", "JPEG"),
            ("train/cat/b.b.png", "PNG"),
            ("train/cat/c", "JPEG"),
            ("train/dog/d.webp", "WEBP"),
        ]
        + [("train/dog/e.gif", "GIF"), ("val/cat/f.JPEG", "JPEG"), ("val/dog/g.png", "JPEG")]
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.integers(0, 255, (9 + number, 12, 3), dtype=np.uint8))
        image.save(path, file_format)
    return tmp_path / "photos"


def test_bytes_are_kept_as_they_are_and_endings_tell_the_format(photos, tmp_path, capsys):
    assert run(["shard", str(photos), str(tmp_path / "out"), "--size", "3"]) == 0
    text = output(capsys)
    assert "5 train, 2 val in 3 shards, 0.0 MB" in text
    assert f"train: {tmp_path}/out/train-{{000000..000001}}.tar" in text
    assert f"next: vitrail train {tmp_path}/out" in text
    found = members(tmp_path / "out")
    assert len(found) == 21
    endings = {}
    for name, content in found.items():
        if name.endswith(".json"):
            metadata = json.loads(content)
            key = name.removesuffix(".json")
            image = next(each for each in found if each.startswith(f"{key}.") and each[-4:] not in ("json", ".cls"))
            assert found[image] == (photos / metadata["path"]).read_bytes()
            assert metadata["label"] == metadata["path"].split("/")[1]
            assert metadata["split"] == metadata["path"].split("/")[0] == key.split("-")[0]
            assert found[f"{key}.cls"] == str(["cat", "dog"].index(metadata["label"])).encode()
            endings[metadata["path"]] = image.rpartition(".")[2]
    assert endings == {
        "train/cat/a.jpg": "jpg", "train/cat/b.b.png": "png", "train/cat/c": "jpg", "train/dog/d.webp": "webp",
        "train/dog/e.gif": "gif", "val/cat/f.JPEG": "jpg", "val/dog/g.png": "jpg",
    }  # fmt: skip
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "classes.json", "train-000000.tar", "train-000001.tar", "val-000000.tar"
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"classes": ["cat", "dog"], "flip_reason": ""}


def test_equal_input_gives_equal_bytes_and_the_seed_the_order(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=9)
    config = DataConfig(source=str(folder))
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_shards(config, tmp_path / name, size=10, seed=seed)
    one, two, three = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two", "three")
    )
    assert one == two
    assert one.keys() == three.keys()
    assert one["pictures-000000.tar"] != three["pictures-000000.tar"]
    first = [
        json.loads(content)["label"] for name, content in members(tmp_path / "one").items() if name.endswith("json")
    ]
    assert all(len(set(first[start : start + 9])) == 3 for start in (0, 9, 18)), "classes were to be mixed"


def test_size_and_bytes_limit_a_shard(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=9)
    for size, limit in ((4, None), (100, 20_480), (100, 1), (3, 30_720)):
        out = tmp_path / f"{size}-{limit}"
        written = write_shards(DataConfig(source=str(folder)), out, size=size, limit_bytes=limit)
        lengths = [path.stat().st_size for path in sorted(out.glob("*.tar"))]
        assert sum(lengths) == written.num_bytes
        counts = [
            sum(name.startswith(f"{path.stem}/") for name in members(out)) // 3 for path in sorted(out.glob("*.tar"))
        ]
        assert sum(counts) == 27
        assert max(counts) <= size
        assert all(length % 10_240 == 0 and (limit is None or length <= limit or limit == 1) for length in lengths)
        if limit == 1:
            assert counts == [1] * 27
        assert len(open_dataset(str(out)).paths) == 27


def test_digits_become_png_of_the_same_pixels_and_still_must_not_be_mirrored(tmp_path):
    write_shards(DataConfig(source="digits"), tmp_path / "out", size=600)
    digits, shards = open_dataset("digits"), open_dataset(str(tmp_path / "out"))
    assert isinstance(digits, ArrayDataset)
    assert shards.flip_reason == digits.flip_reason
    paths = list(digits.paths)
    metadata = [json.loads(each) for name, each in members(tmp_path / "out").items() if name.endswith(".json")]
    for index in range(0, 1797, 50):
        image = shards.read(index, "L")
        assert image.tobytes() == digits.read(paths.index(metadata[index]["path"]), "L").tobytes()


def test_shards_of_shards_keep_bytes_and_labels(photos, tmp_path):
    write_shards(DataConfig(source=str(photos)), tmp_path / "one", size=2)
    write_shards(DataConfig(source=str(tmp_path / "one")), tmp_path / "two", size=5, seed=7)

    def images(folder: Path) -> list[tuple[bytes, str]]:
        dataset = open_dataset(str(folder))
        return sorted((dataset.encoded(i), dataset.labels[dataset.targets[i]]) for i in range(len(dataset.paths)))

    assert images(tmp_path / "one") == images(tmp_path / "two")


def test_broken_images_stop_the_writing_by_default(photos, tmp_path, capsys):
    (photos / "train/dog/e.gif").write_bytes((photos / "train/dog/e.gif").read_bytes()[:60])
    (photos / "train/cat/a.jpg").write_bytes(b"no image")
    assert run(["shard", str(photos), str(tmp_path / "out")]) == 1
    text = output(capsys)
    assert "photos/train/dog/e.gif: " in text
    assert "photos/train/cat/a.jpg: unreadable" in text
    assert "--data.damaged drop" in text
    assert [each.name for each in tmp_path.iterdir()] == ["photos"], "nothing was to be left"


def test_broken_images_can_be_dropped_or_kept(photos, tmp_path, capsys):
    broken = photos / "train/cat/a.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])
    (photos / "train/dog/e.gif").write_bytes(b"GIF89a no image")
    for damaged, count, left_out in (("drop", 5, 2), ("keep", 6, 1)):
        out = tmp_path / damaged
        assert run(["shard", str(photos), str(out), "--data.damaged", damaged]) == 0
        text = output(capsys)
        assert "warning:" in text
        assert "train/dog/e.gif: unreadable" in text
        assert f"{left_out} broken ones left out" in text
        found = members(out)
        assert len(found) == 3 * count
        assert (broken.read_bytes() in found.values()) == (damaged == "keep")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full"], "full: is not empty; choose another OUT"),
        (["file"], "file: is a file; choose another OUT"),
        (["out", "--size", "0"], "--size 0: expected at least 1"),
        (["out", "--bytes", "0"], "--bytes 0: expected at least 1"),
    ],
)
def test_impossible_outputs_are_refused(make_folder, tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "shapes", count=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    assert run(["shard", "shapes", *arguments]) == 1
    assert message in output(capsys)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_used_and_a_nested_one_made(make_folder, tmp_path):
    folder = make_folder(tmp_path / "shapes", count=1)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        write_shards(DataConfig(source=str(folder)), out, size=10)
        assert len(open_dataset(str(out)).paths) == 3


def test_a_full_disk_leaves_nothing(make_folder, tmp_path):
    """A real full disk: /dev/full takes no byte."""
    folder = make_folder(tmp_path / "shapes", count=1)
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    with pytest.raises(ValueError, match="the disk is full; nothing is left"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_text", lambda path, text: Path("/dev/full").write_text(text))
        write_shards(DataConfig(source=str(folder)), tmp_path / "out", size=10)
    assert [each.name for each in tmp_path.iterdir()] == ["shapes"]


def test_labels_that_cannot_be_read_back_are_refused(tmp_path):
    for name in (" cat", "dog"):
        (tmp_path / "s" / name).mkdir(parents=True)
        with io.BytesIO() as file:
            Image.new("L", (4, 4)).save(file, "PNG")
            (tmp_path / "s" / name / "a.png").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="class ' cat' begins or ends with a blank; rename it"):
        write_shards(DataConfig(source=str(tmp_path / "s")), tmp_path / "out", size=10)


def test_weights_and_groups_of_a_table_go_with_its_images(make_folder, tmp_path):
    root = make_folder(tmp_path / "shapes", count=3)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
    lines = [f"{row},g{number // 2},{1 + number / 4}" for number, row in enumerate(rows)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,group,weight", *lines]))
    write_shards(DataConfig(source=str(tmp_path / "t.csv")), tmp_path / "out", size=4)
    table, shards = open_dataset(str(tmp_path / "t.csv")), open_dataset(str(tmp_path / "out"))

    def content(dataset):
        return sorted(
            (dataset.read(i, "RGB").tobytes(), dataset.labels[dataset.targets[i]], dataset.weights[i]) for i in range(9)
        )

    assert content(shards) == content(table)
    assert len(set(shards.groups.tolist())) == 5
    one = next((tmp_path / "out").glob("*000001.tar"))
    whole = one.read_bytes()
    for old, new, message in (
        (b'"weight": 1.', b'"wEight": 1.', "has no weight in its .json, but others have"),
        (b'"weight": 1.', b'"weight": -.', "is no JSON|no number above 0"),
    ):
        one.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            open_dataset(str(tmp_path / "out"))


def test_numbers_as_class_names_go_round(make_folder, tmp_path):
    """Class 2 of `1 10 2` is written as .cls 2, which is also a name of another class."""
    root = make_folder(tmp_path / "shapes", classes=("1", "10", "2"), count=3)
    write_shards(DataConfig(source=str(root)), tmp_path / "out", size=4)
    folder, shards = open_dataset(str(root)), open_dataset(str(tmp_path / "out"))
    assert folder.labels == shards.labels == ("1", "10", "2")

    def content(dataset):
        return sorted((dataset.read(i, "RGB").tobytes(), dataset.labels[dataset.targets[i]]) for i in range(9))

    assert content(folder) == content(shards)
    for path in (tmp_path / "out").glob(
        "*.tar"
    ):  # without the label in .json, the number alone must give the same class
        path.write_bytes(path.read_bytes().replace(b'{"label"', b'{"ladel"'))
    assert content(open_dataset(str(tmp_path / "out"))) == content(folder)
