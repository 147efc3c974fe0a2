"""Fashion-MNIST and CIFAR-10 (JPEG) as tables: the main job, with groups, and the same data in other forms."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vitrail.cli import run

NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.mark.slow
def test_fashion_mnist_as_a_table_with_groups(shared_data, tmp_path, capsys):
    with np.load(shared_data / "fashion_mnist.npz") as arrays:
        pixels, targets = arrays["x_train"][:3000], arrays["y_train"][:3000]
    table = tmp_path / "fashion.csv"
    (tmp_path / "p").mkdir()
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "weight"])
        for number, (image, target) in enumerate(zip(pixels, targets, strict=True)):
            Image.fromarray(image).save(tmp_path / "p" / f"{number}.png")
            writer.writerow([f"p/{number}.png", NAMES[target], f"batch {number // 7}", 1])
    out = tmp_path / "run"
    assert run(["train", str(table), "--out", str(out), "--epochs", "3", "--model", "nano7"]) == 0
    assert "groups kept whole" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())["val"]
    assert result["labels"] == sorted(NAMES)
    assert abs(result["num_images"] - 600) <= 20
    assert result["top1"] > 0.4
    splits = json.loads((out / "split.json").read_text())["splits"]
    groups = [{int(Path(path).stem) // 7 for path in paths} for paths in splits.values()]
    assert not groups[0] & groups[1]


@pytest.mark.slow
def test_cifar_as_table_and_as_parquet_with_images_gives_the_same_figures(shared_data, tmp_path):
    """One model evaluated on the same images in three forms."""
    wanted = {f"{number:04d}.jpg" for number in range(30)}
    with tarfile.open(shared_data / "cifar10.tar.xz") as tar:
        for member in tar:
            if member.isfile() and Path(member.name).name in wanted:
                tar.extract(member, tmp_path / "cifar", filter="data")
    root = next(path for path in (tmp_path / "cifar").rglob("train") if path.is_dir()).parent
    files = sorted(path.relative_to(root) for path in root.rglob("*.jpg"))
    rows = [{"path": str(file), "label": file.parts[1], "split": file.parts[0]} for file in files]
    (root / "cifar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        chosen = [file for file in files if file.parts[0] == split]
        columns = {
            "image": [(root / file).read_bytes() for file in chosen],
            "label": [file.parts[1] for file in chosen],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    out = tmp_path / "run"
    assert run(["train", str(root / "cifar.jsonl"), "--out", str(out), "--epochs", "1", "--model", "nano8"]) == 0
    own = json.loads((out / "evaluation.json").read_text())["test"]
    assert own["num_images"] == 300
    for source in (str(root / "cifar.jsonl"), str(root), f"hf:{tmp_path / 'hub'}"):
        assert run(["eval", str(out), source, "--split", "test", "--out", str(tmp_path / "e.json")]) == 0
        evaluation = json.loads((tmp_path / "e.json").read_text())
        assert evaluation["confusion"] == own["confusion"]
        assert evaluation["loss"] == pytest.approx(own["loss"], rel=1e-5)
