"""The main job on real images: JPEG class folders with train/ and val/, and CIFAR-10's train/ and test/."""

import json
import tarfile
from pathlib import Path

import pytest

from vitrail.cli import run


def unpack(archive: Path, target: Path, *, keep) -> Path:
    """Unpack the members that `keep(name)` wants."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and keep(member.name):
                tar.extract(member, target, filter="data")
    return target


@pytest.mark.slow
def test_photographs_of_all_sizes_are_read_from_files(shared_data, tmp_path, capsys):
    data = unpack(shared_data / "hymenoptera.tar", tmp_path / "photos", keep=lambda name: True)
    roots = [path for path in data.rglob("train") if path.is_dir()]
    root, out = roots[0].parent, tmp_path / "run"
    arguments = ["--epochs", "2", "--model", "nano16", "--model.image-size", "64", "--batch-size", "32"]
    assert run(["train", str(root), "--out", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "2 classes; 2" in printed
    assert "the folders train/, val/" in printed
    result = json.loads((out / "evaluation.json").read_text())["val"]
    assert result["num_images"] == 153
    assert result["top1"] > 0.5
    config = json.loads((out / "config.json").read_text())
    assert config["augment"]["flip"] == 0.5
    images = sorted(str(path) for path in (root / "val" / "ants").glob("*"))[:8]
    assert run(["predict", str(out), *images, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    # Preprocessing is the same function in training's evaluation, in `eval` and in `predict`.
    assert run(["eval", str(out), str(root), "--out", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["confusion"] == result["confusion"]
    assert [row["error"] for row in rows] == [None] * 8


@pytest.mark.slow
def test_cifar_folders_work_with_no_other_flag(shared_data, tmp_path, capsys):
    wanted = {f"{number:04d}.jpg" for number in range(60)}
    data = unpack(shared_data / "cifar10.tar.xz", tmp_path / "cifar", keep=lambda name: Path(name).name in wanted)
    root = next(path for path in data.rglob("train") if path.is_dir()).parent
    out = tmp_path / "run"
    assert run(["train", str(root), "--out", str(out), "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "10 classes; 480 train, 120 val, 600 test" in printed
    assert "val: a stratified 20% of train/" in printed
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["test"]["num_images"] == 600
    splits = json.loads((out / "split.json").read_text())["splits"]
    assert not set(splits["test"]) & set(splits["train"] + splits["val"])
    assert all(path.startswith("train/") for path in splits["val"])
