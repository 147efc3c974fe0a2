"""Probing on real photographs of all sizes: the saved model evaluates as the probe does, and a second probe decodes nothing."""

import json

import pytest
from test_photographs import unpack

from vitrail.cli import run


@pytest.mark.slow
def test_probe_of_photographs(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    data = unpack(shared_data / "hymenoptera.tar", tmp_path / "photos", keep=lambda name: True)
    root = next(path for path in data.rglob("train") if path.is_dir()).parent
    saved, out, evaluated = tmp_path / "new.safetensors", tmp_path / "p.json", tmp_path / "e.json"
    arguments = ["probe", "nano16", str(root), "--image-size", "64", "--out", str(out)]
    assert run([*arguments, "--save", str(saved)]) == 0
    report = json.loads(out.read_text())
    assert (report["num_train"], report["num_images"], report["split"]) == (245, 153, "val")
    assert min(report["knn"], report["ridge"], report["logistic"]) > 0.45
    assert run(["eval", str(saved), str(root), "--out", str(evaluated)]) == 0
    assert json.loads(evaluated.read_text())["top1"] == report["logistic"]
    assert run(arguments) == 0
    again = json.loads(out.read_text())
    assert (again["computed"], again["from_cache"]) == (0, 398)
    assert again["seconds_each"]["data"] < report["seconds_each"]["data"] / 2
