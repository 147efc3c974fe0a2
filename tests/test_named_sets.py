"""Datasets by name: torchvision's, in their own files on disk, and those of the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torchvision
from PIL import Image

from vitrail.cli import run
from vitrail.data.datasets.base import ArrayDataset, FileDataset, ParquetDataset
from vitrail.data.datasets.keys import image_keys
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.torchvision_sets import SETS
from vitrail.data.images.decode import ImageError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_network(monkeypatch) -> None:
    """Send every download to a port where nobody listens."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array as MNIST's files have it, gzipped or not as the name says."""
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def bars(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return grey images whose class, 0 to 9, is the row of a bright bar."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % 10
    pixels = random.integers(0, 90, (count, side, side), dtype=np.uint8)
    for number, target in enumerate(targets):
        row = 1 + target * (side - 3) // 9
        pixels[number, row : row + 2] = 230
    return pixels, targets.astype(np.uint8)


def mnist_files(raw: Path, train: int = 80, test: int = 40) -> None:
    for split, count, seed in (("train", train, 0), ("t10k", test, 1)):
        pixels, targets = bars(count, 28, seed)
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{split}-labels-idx1-ubyte", targets)


@pytest.mark.parametrize("name", SETS)
def test_torchvision_takes_the_arguments_of_every_entry(name):
    entry, dataset_class = SETS[name], getattr(torchvision.datasets, name)
    assert "test" in entry.splits or "" in entry.splits
    for arguments in entry.splits.values():
        inspect.signature(dataset_class).bind("root", download=True, **arguments)


def test_mnist_in_its_own_files(cache):
    mnist_files(cache / "torchvision" / "MNIST" / "MNIST" / "raw")
    dataset = open_dataset("torchvision:mnist")
    assert isinstance(dataset, ArrayDataset)
    assert dataset.name == "torchvision:MNIST"
    assert dataset.labels[7] == "7 - seven"
    assert dataset.flip_reason  # the names do not show that a mirrored 7 is no 7
    assert dataset.split is not None
    assert [int((dataset.split == split).sum()) for split in ("train", "test")] == [80, 40]
    assert (dataset.paths[0], dataset.paths[80]) == ("train/000000", "test/000000")
    pixels, targets = bars(40, 28, 1)
    np.testing.assert_array_equal(np.asarray(dataset.read(83, "L")), pixels[3])
    np.testing.assert_array_equal(dataset.targets[80:], targets)
    keys = image_keys(dataset, np.arange(120), "L")
    assert len(set(keys.tolist())) == 120
    with pytest.raises(IndexError):
        dataset.read(120, "L")


def test_every_command_works_with_torchvision(cache, tmp_path, capsys, monkeypatch):
    mnist_files(cache / "torchvision" / "FashionMNIST" / "FashionMNIST" / "raw")
    monkeypatch.chdir(tmp_path)
    sizes = ["--model", "nano7", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    assert run(["train", "torchvision:FashionMNIST", *sizes, "--epochs", "1", "--batch-size", "16"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "torchvision:FashionMNIST: 10 classes; 60 train, 20 val, 40 test" in output
    assert "its own splits train, test; val: a stratified 20% of train" in output
    out = tmp_path / "runs" / "FashionMNIST"
    own = json.loads((out / "evaluation.json").read_text())
    assert own["test"]["num_images"] == 40
    split = json.loads((out / "split.json").read_text())["splits"]
    assert all(path.startswith("train/") for path in split["val"])
    assert all(path.startswith("test/") for path in split["test"])
    assert run(["train", "torchvision:fashionmnist", "--resume", "--out", str(out)]) == 0
    assert run(["eval", str(out), "torchvision:FashionMNIST", "--out", "e.json"]) == 0
    evaluated = json.loads(Path("e.json").read_text())
    assert (evaluated["split"], evaluated["confusion"]) == ("test", own["test"]["confusion"])
    for computed in (True, False):
        assert run(["probe", str(out), "torchvision:FashionMNIST", "--out", "p.json"]) == 0
        assert bool(json.loads(Path("p.json").read_text())["computed"]) == computed


def test_cifar_in_its_own_files(cache, monkeypatch):
    """The real class reads the test's batches; the checksums it demands are theirs."""
    dataset_class = torchvision.datasets.CIFAR10
    root = cache / "torchvision" / "CIFAR10" / dataset_class.base_folder
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (24, 3, 32, 32), dtype=np.uint8)

    def save(name: str, content: dict) -> list[str]:
        (root / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    def batch(start: int) -> dict:
        return {"data": pixels[start : start + 4].reshape(4, -1), "labels": [start % 10, 1, 2, 3]}

    names = [f"c{number}" for number in range(10)]
    monkeypatch.setattr(dataset_class, "train_list", [save(f"data_batch_{n + 1}", batch(4 * n)) for n in range(5)])
    monkeypatch.setattr(dataset_class, "test_list", [save("test_batch", batch(20))])
    meta = save("batches.meta", {"label_names": names})
    monkeypatch.setattr(dataset_class, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    dataset = open_dataset("torchvision:CIFAR10")
    assert dataset.labels == tuple(names)
    assert dataset.targets.tolist()[:5] == [0, 1, 2, 3, 4]
    assert [str(split) for split in dataset.split[[0, 19, 20, 23]]] == ["train", "train", "test", "test"]
    for index in (0, 7, 21):
        np.testing.assert_array_equal(np.asarray(dataset.read(index, "RGB")), pixels[index].transpose(1, 2, 0))
    (root / "data_batch_3").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"torchvision:CIFAR10: the files in .* are not whole .* remove that folder"):
        open_dataset("torchvision:CIFAR10")


def test_sets_that_are_files_are_read_as_files(cache):
    for number, name in enumerate(("Forest", "River")):
        folder = cache / "torchvision" / "EuroSAT" / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for image in range(3):
            Image.new("RGB", (8, 8), (image, number, 0)).save(folder / f"{name}_{image}.jpg")
    dataset = open_dataset("torchvision:EuroSAT")
    assert isinstance(dataset, FileDataset)
    assert dataset.split is None
    assert dataset.labels == ("Forest", "River")
    assert dataset.paths[4] == "eurosat/2750/River/River_1.jpg"
    assert dataset.read(4, "RGB").size == (8, 8)
    assert dataset.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_pets_keep_their_published_splits(cache):
    root = cache / "torchvision" / "OxfordIIITPet" / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_2 2 2 1\n")
    (root / "annotations" / "test.txt").write_text("Abyssinian_3 1 1 1\nbeagle_4 2 2 1\n")
    for number, name in enumerate(("Abyssinian_1", "beagle_2", "Abyssinian_3", "beagle_4")):
        Image.new("RGB", (9, 7), (number, 0, 0)).save(root / "images" / f"{name}.jpg")
    dataset = open_dataset("torchvision:OxfordIIITPet")
    assert dataset.labels == ("Abyssinian", "Beagle")
    assert dataset.split is not None
    assert dataset.split.tolist() == ["train", "train", "test", "test"]
    assert dataset.read(3, "RGB").size == (9, 7)


def test_without_network_the_error_is_short_and_nothing_is_left(cache, monkeypatch, capsys):
    no_network(monkeypatch)
    with pytest.raises(ValueError, match="connect this machine to the network, or put the files") as caught:
        open_dataset("torchvision:SVHN")
    assert str(caught.value).startswith("torchvision:SVHN: cannot be downloaded (")
    assert len(str(caught.value)) < 400
    assert not list((cache / "torchvision").glob("*SVHN*.part"))
    assert not (cache / "torchvision" / "SVHN").exists()


def test_unknown_names_suggest_the_nearest_known():
    with pytest.raises(ValueError, match=r"unknown dataset 'cifar-10'; did you mean 'CIFAR10'\?"):
        open_dataset("torchvision:cifar-10")


# --- hf:


def encoded(level: int, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (level, 0, 0)).save(stream, file_format)
    return stream.getvalue()


def hub_file(path: Path, levels: list[int], names: list[str] | None = None) -> None:
    """Write a Parquet file as the hub's library does: images as {bytes, path}, class names in the metadata."""
    table = pyarrow.table(
        {
            "image": [{"bytes": encoded(level), "path": f"{level}.png"} for level in levels],
            "label": pyarrow.array([level % 2 for level in levels], pyarrow.int64()),
        }
    )
    if names:
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def test_a_folder_of_parquet_with_images(cache, tmp_path):
    root = tmp_path / "beans"
    for stem, levels in (("train-00000-of-00002", [10, 11]), ("train-00001-of-00002", [12, 13, 14])):
        hub_file(root / "data" / f"{stem}.parquet", levels, ["rust", "healthy"])
    hub_file(root / "data" / "validation-00000-of-00001.parquet", [20, 21], ["rust", "healthy"])
    dataset = open_dataset(f"hf:{root}")
    assert isinstance(dataset, ParquetDataset)
    assert (dataset.name, dataset.labels) == ("hf:beans", ("rust", "healthy"))  # the file's own order
    assert dataset.split is not None
    assert dataset.split.tolist() == ["train"] * 5 + ["val"] * 2
    assert [dataset.read(index, "RGB").getpixel((0, 0))[0] for index in range(7)] == [10, 11, 12, 13, 14, 20, 21]
    assert dataset.targets.tolist() == [0, 1, 0, 1, 0, 0, 1]
    assert dataset.paths[3] == "train-00001-of-00002/000001"
    assert isinstance(dataset.content, np.memmap)
    assert len(set(image_keys(dataset, np.arange(7), "RGB").tolist())) == 7
    first = {path: path.stat().st_mtime_ns for path in (cache / "packed").iterdir()}
    open_dataset(f"hf:{root}")
    assert {path: path.stat().st_mtime_ns for path in (cache / "packed").iterdir()} == first


def test_one_parquet_file_with_images_and_without_class_names(cache, tmp_path):
    hub_file(tmp_path / "all.parquet", [3, 4, 5])
    dataset = open_dataset(str(tmp_path / "all.parquet"))
    assert isinstance(dataset, ParquetDataset)
    assert dataset.labels == ("0", "1")
    assert dataset.split is None
    assert dataset.targets.tolist() == [1, 0, 1]


def test_a_broken_image_in_parquet_is_named(cache, tmp_path):
    table = pyarrow.table({"image": [encoded(1), b"no image"], "label": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    dataset = open_dataset(str(tmp_path / "p.parquet"))
    assert dataset.read(0, "L").size == (5, 4)
    with pytest.raises(ImageError, match=r"p\.parquet: p/000001: unreadable"):
        dataset.read(1, "L")


@pytest.mark.parametrize(
    ("columns", "name", "message"),
    [
        ({"image": [b"x"], "label": [None]}, "a.parquet", r"a\.parquet, row 1: no label; write one"),
        ({"image": [None], "label": ["a"]}, "a.parquet", r"a\.parquet, row 1: no bytes of an image"),
        ({"image": [b"x"], "answer": ["a"]}, "a.parquet", "has no column 'label', but image, answer"),
        ({"text": ["x"], "label": ["a"]}, "a.parquet", "has no column of images"),
    ],
)
def test_parquet_that_cannot_be_used(cache, tmp_path, columns, name, message):
    if None in columns.get("image", ()):
        columns = {**columns, "image": pyarrow.array([None], pyarrow.binary())}
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "set" / name)
    with pytest.raises(ValueError, match=message):
        open_dataset(f"hf:{tmp_path / 'set'}")


def test_train_and_probe_on_parquet_with_images(cache, make_folder, tmp_path, capsys):
    folder = make_folder(tmp_path / "shapes", count=12)
    rows = sorted(folder.rglob("*.png"))
    pixels = [{"bytes": path.read_bytes(), "path": path.name} for path in rows]
    (tmp_path / "set").mkdir()
    table = pyarrow.table({"image": pixels, "label": [path.parent.name for path in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "everything.parquet")
    shutil.rmtree(folder)
    data, out = f"hf:{tmp_path / 'set'}", tmp_path / "out"
    sizes = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    assert run(["train", data, "--out", str(out), *sizes, "--epochs", "1", "--batch-size", "16"]) == 0
    assert "hf:set: 3 classes; 30 train, 6 val" in capsys.readouterr().out
    assert run(["eval", str(out), data, "--out", str(tmp_path / "e.json")]) == 0
    evaluated, own = (json.loads(path.read_text()) for path in (tmp_path / "e.json", out / "evaluation.json"))
    assert evaluated["confusion"] == own["val"]["confusion"]
    for computed in (36, 0):
        assert run(["probe", str(out), data, "--out", str(tmp_path / "p.json")]) == 0
        assert json.loads((tmp_path / "p.json").read_text())["computed"] == computed


def test_a_folder_of_class_folders_by_hf(make_folder, tmp_path):
    dataset = open_dataset(f"hf:{make_folder(tmp_path / 'shapes', count=2)}")
    assert isinstance(dataset, FileDataset)
    assert (dataset.name, dataset.labels) == ("hf:shapes", ("flat", "slant", "steep"))


def test_names_of_the_hub_need_the_extra(cache):
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"hf:beans: .* pip install 'vitrail\[hf\]', or download .* hf:FOLDER"):
            open_dataset("hf:beans")
    with pytest.raises(ValueError, match=r"hf:\./beans: no such folder"):
        open_dataset("hf:./beans")
