"""One scan for all commands and ranks: what is decoded is counted, where images are decoded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from vitrail.cli import run
from vitrail.data.check import scan as scan_module
from vitrail.data.datasets.base import FileDataset
from vitrail.data.datasets.open import open_dataset

TRAIN = ["--model", "nano8", "--model.depth", "1", "--model.embed-dim", "24", "--model.num-heads", "2", "--epochs", "1",
         "--batch-size", "8", "--model.image-size", "32", "--precision", "fp32", "--device", "cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """30 JPEGs of 320 × 260 pixels in two classes, too large to stay in memory, with val/ and test/ of their own."""
    random = np.random.default_rng(3)
    for split, count in (("train", 10), ("val", 3), ("test", 2)):
        for label in ("fine", "coarse"):
            for number in range(count):
                coarse = random.integers(0, 256, (6, 8, 3) if label == "coarse" else (26, 32, 3), dtype=np.uint8)
                path = tmp_path / "photos" / split / label / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(coarse).resize((320, 260), PIL.Image.Resampling.BICUBIC).save(path, quality=90)
    return tmp_path / "photos"


class Decodes:
    """Paths that a scan decoded, and those that were read to be trained on, evaluated or sampled for colour."""

    def __init__(self) -> None:
        self.scanned: list[str] = []
        self.read: list[str] = []

    def clear(self) -> None:
        self.scanned, self.read = [], []


@pytest.fixture
def decodes(monkeypatch) -> Decodes:
    """Count every decoding: the scan's, and those of the dataset itself."""
    found = Decodes()
    scan, read = scan_module.read_described, FileDataset.read

    def count_scan(stored, **more):
        found.scanned.append(Path(stored).parts[-3])
        return scan(stored, **more)

    def count_read(dataset, index, mode):
        found.read.append(dataset.paths[index].split("/")[0])
        return read(dataset, index, mode)

    monkeypatch.setattr(scan_module, "read_described", count_scan)
    monkeypatch.setattr(FileDataset, "read", count_read)
    return found


def test_train_after_check_decodes_nothing_in_its_scan(photos, tmp_path, decodes, monkeypatch):
    assert run(["check", str(photos), "--out", str(tmp_path / "check.json")]) == 0
    assert len(decodes.scanned) == 30, "each file once"
    decodes.clear()
    monkeypatch.chdir(photos.parent)  # another way to write the same folder
    assert run(["train", "photos", "--out", str(tmp_path / "run"), *TRAIN]) == 0
    assert decodes.scanned == []
    checked = json.loads((tmp_path / "check.json").read_text())
    recorded = json.loads((tmp_path / "run" / "split.json").read_text())
    assert checked["fingerprint"] == recorded["fingerprint"]
    decodes.clear()
    assert run(["probe", str(tmp_path / "run"), str(photos)]) == 0
    assert decodes.scanned == [], "nor does a probe"


def test_check_after_train_finds_what_a_first_check_finds(photos, tmp_path, monkeypatch, decodes):
    turned = PIL.Image.open(photos / "train" / "fine" / "0.jpg")
    exif = turned.getexif()
    exif[274] = 6
    turned.save(photos / "train" / "fine" / "turned.jpg", exif=exif, quality=90)
    PIL.Image.new("P", (40, 300)).save(photos / "train" / "fine" / "palette.png")
    assert run(["check", str(photos), "--out", str(tmp_path / "first.json")]) == 0
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "other"))
    assert run(["train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    decodes.clear()
    assert run(["check", str(photos), "--out", str(tmp_path / "second.json")]) == 0
    assert decodes.scanned == []
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert {"orientation", "mode"} <= {problem["kind"] for problem in first["problems"]}
    assert (first["num_cached"], second["num_cached"]) == (0, 32)
    assert {**first, "seconds": 0, "num_cached": 0} == {**second, "seconds": 0, "num_cached": 0}


def test_eval_of_a_split_decodes_that_split_only(photos, tmp_path, monkeypatch, decodes):
    assert run(["train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "other"))
    for model in (tmp_path / "run", tmp_path / "alone.safetensors"):
        if not model.exists():  # a model file without its run
            model.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
        decodes.clear()
        assert run(["eval", str(model), str(photos), "--split", "val", "--out", str(tmp_path / "val.json")]) == 0
        assert set(decodes.scanned) <= {"val"}
        assert set(decodes.read) == {"val"}
        assert len(decodes.read) == 6
    result = json.loads((tmp_path / "val.json").read_text())
    expected = json.loads((tmp_path / "run" / "evaluation.json").read_text())["val"]
    assert result["fingerprint"] == expected["fingerprint"]
    assert result["loss"] == expected["loss"]


def test_a_broken_file_of_another_split_does_not_stop_an_evaluation(photos, tmp_path, capsys):
    assert run(["train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    (photos / "train" / "fine" / "0.jpg").write_bytes(b"no image")
    assert run(["eval", str(tmp_path / "run"), str(photos), "--split", "val"]) == 0
    (photos / "val" / "fine" / "0.jpg").write_bytes(b"no image")
    capsys.readouterr()
    assert run(["eval", str(tmp_path / "run"), str(photos), "--split", "val"]) == 1
    assert "val/fine/0.jpg" in capsys.readouterr().err


def test_a_changed_file_is_decoded_again_and_only_it(photos, tmp_path, decodes):
    assert run(["check", str(photos)]) == 0
    decodes.clear()
    PIL.Image.new("RGB", (300, 280), "teal").save(photos / "val" / "fine" / "0.jpg")
    assert run(["check", str(photos)]) == 0
    assert decodes.scanned == ["val"]


def test_a_run_without_the_broken_file_is_evaluated_as_before(photos, tmp_path, capsys):
    """The broken training image is in no split and not new, and the fingerprint is the run's, with its folder or without."""
    (photos / "train" / "fine" / "0.jpg").write_bytes(b"no image")
    assert run(["train", str(photos), "--out", str(tmp_path / "run"), "--data.damaged", "drop", *TRAIN]) == 0
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    fingerprint = json.loads((tmp_path / "run" / "split.json").read_text())["fingerprint"]
    for model in ("run", "alone.safetensors"):
        capsys.readouterr()
        words = [
            "eval",
            str(tmp_path / model),
            str(photos),
            "--data.damaged",
            "drop",
            "--out",
            str(tmp_path / "e.json"),
        ]
        assert run(words) == 0
        assert "came after the split" not in capsys.readouterr().out
        assert json.loads((tmp_path / "e.json").read_text())["fingerprint"] == fingerprint
    PIL.Image.new("RGB", (300, 280), "teal").save(photos / "val" / "fine" / "new.jpg")
    assert run(["eval", str(tmp_path / "run"), str(photos), "--data.damaged", "drop"]) == 0
    assert "came after the split that the model was trained with: 1 images" in " ".join(capsys.readouterr().out.split())


def test_a_split_that_was_drawn_is_known_again_under_another_name(photos, tmp_path):
    """Without val/ a part of train/ is held out; in a copy of the folder those images must not count as trained on."""
    shutil.rmtree(photos / "val")
    assert run(["train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    shutil.copytree(photos, tmp_path / "copy")
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    words = ["eval", str(tmp_path / "alone.safetensors"), str(tmp_path / "copy"), "--split", "val"]
    assert run([*words, "--out", str(tmp_path / "val.json")]) == 0
    result = json.loads((tmp_path / "val.json").read_text())
    assert result["loss"] == json.loads((tmp_path / "run" / "evaluation.json").read_text())["val"]["loss"]


def test_the_colour_of_files_that_are_left_out_does_not_count(tmp_path):
    """A damaged colour image makes a grey dataset a colour one where it is kept, and not where it is dropped, in any order."""
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
    PIL.Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "colour.jpg", quality=95)
    (tmp_path / "data" / "a" / "cut.jpg").write_bytes((tmp_path / "colour.jpg").read_bytes()[:-900])
    for damaged, colour in (("drop", False), ("keep", True), ("drop", False)):
        dataset = open_dataset(str(tmp_path / "data"), keep_damaged=damaged == "keep")
        settings = scan_module.ScanSettings(damaged, near_duplicates=False, limit_pixels=10**8)
        assert scan_module.scan_dataset(dataset, settings).colour is colour


COUNTING = """
import json, sys
from pathlib import Path
from vitrail.data.check import scan
from vitrail.distributed import shutdown
import vitrail.cli
real, seen = scan.read_described, []
def counting(stored, **more):
    seen.append(str(stored))
    return real(stored, **more)
scan.read_described = counting
import os
code = vitrail.cli.run(sys.argv[2:])
Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
sys.exit(code)
"""


@pytest.mark.slow
def test_under_two_ranks_each_file_is_scanned_once(photos, tmp_path):
    (tmp_path / "program.py").write_text(COUNTING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "program.py")]
    words = [*launch, str(tmp_path), "train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    zero, one = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(zero) == len(set(zero)) == 30
    assert one == []


@pytest.mark.slow
def test_an_error_that_the_main_rank_finds_ends_all_ranks(photos, tmp_path):
    """A broken file is met by the scan of rank 0; rank 1 must not wait for it for ever."""
    (photos / "train" / "fine" / "0.jpg").write_bytes(b"no image")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vitrail"]
    words = [*launch, "train", str(photos), "--out", str(tmp_path / "run"), *TRAIN]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "train/fine/0.jpg" in done.stderr
    assert not (tmp_path / "run").exists()
