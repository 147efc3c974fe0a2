"""Training on shards gives the batches that files would give; shards and the webdataset library read each other."""

from __future__ import annotations

import gc
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from shard_files import opened, png, reds

from vitrail.cli import run
from vitrail.config import AugmentConfig, DataConfig
from vitrail.data.check.scan import ScanSettings, scan_dataset
from vitrail.data.datasets.base import Dataset, TarDataset
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.write_shards import write_shards
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.train_loader import ImageReader, TrainLoader
from vitrail.data.splits.splits import split_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


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
    scan = scan_dataset(shards, ScanSettings("stop", near_duplicates=False, limit_pixels=10**8, workers=1))
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
