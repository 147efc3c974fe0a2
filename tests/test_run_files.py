"""What a run keeps: outputs that metrics can be made of again, and the state of an earlier version that still goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitrail.api import train
from vitrail.console import Console
from vitrail.data.datasets.open import open_dataset
from vitrail.evaluation.metrics import all_metrics
from vitrail.evaluation.outputs import load_outputs, save_outputs
from vitrail.evaluation.predict_logits import Outputs
from vitrail.training.state import from_format_2

QUIET = Console(quiet=True)


def test_outputs_of_a_run_give_its_metrics_again(tiny_run):
    run, data = tiny_run
    dataset = open_dataset(str(data))
    evaluation = json.loads((run / "evaluation.json").read_text())
    recorded = json.loads((run / "split.json").read_text())
    assert sorted(path.stem for path in (run / "outputs").iterdir()) == sorted(evaluation)
    for split, expected in evaluation.items():
        outputs = load_outputs(run / "outputs" / f"{split}.safetensors", dataset.paths)
        assert [dataset.paths[int(index)] for index in outputs.indices] == sorted(recorded["splits"][split])
        assert outputs.logits.dtype == np.float32
        metrics = all_metrics(outputs, dataset.labels, expected["temperature"])
        assert metrics == {name: expected[name] for name in metrics}
        with safe_open(run / "outputs" / f"{split}.safetensors", "np") as file:
            assert (file.metadata()["split"], file.metadata()["fingerprint"]) == (split, recorded["fingerprint"])


def test_outputs_of_other_images_are_refused(tmp_path):
    outputs = Outputs(np.eye(3, dtype=np.float32), np.arange(3), np.arange(3))
    save_outputs(tmp_path / "outputs" / "val.safetensors", outputs, ["a", "b", "c"], split="val", fingerprint="f")
    path = tmp_path / "outputs" / "val.safetensors"
    assert load_outputs(path, ["a", "b", "c", "d"]).targets.tolist() == [0, 1, 2]
    for others in (["a", "b", "x"], ["a", "b"], []):
        with pytest.raises(ValueError, match=r"val\.safetensors: is of other images"):
            load_outputs(path, others)
    save_file({"logits": torch.eye(3)}, path)
    with pytest.raises(ValueError, match="holds no outputs of a model"):
        load_outputs(path)


def as_format_2(folder: Path) -> None:
    """Write a run's state as an earlier version did, whose only objective was classification."""
    path = folder / "last" / "state.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = {}
    for name, tensor in load_file(path).items():
        old = name.replace("objective.average.model.", "average.").replace("objective.model.", "model.")
        tensors[old.replace(".model.", ".") if old.startswith("optimizer.") else old] = tensor
    progress = json.loads(metadata["progress"])
    progress["window"] = {"correct" if name == "top1" else name: each for name, each in progress["window"].items()}
    save_file(tensors, path, {**metadata, "format": "2", "progress": json.dumps(progress)})


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_bit_for_bit(make_folder, tmp_path, tiny):
    from test_training import assert_same_weights, interrupted

    data = make_folder(tmp_path / "data")
    settings = {**tiny, "optim.ema_decay": 0.9, "log.every": "4 steps"}
    whole = train(data, out=tmp_path / "whole", console=QUIET, **settings)
    cut = interrupted(3, data, out=tmp_path / "cut", **settings)
    as_format_2(cut)
    assert any(name.startswith("average.blocks") for name in load_file(cut / "last" / "state.safetensors"))
    train(data, out=cut, console=QUIET, resume=True)
    assert_same_weights(whole.folder, cut)


def test_names_of_format_2_are_translated():
    one = torch.zeros(1)
    old = {"model.head.bias": one, "average.head.bias": one, "optimizer.exp_avg.blocks.0.norm1.bias": one}
    tensors, progress = from_format_2(old, {"step": 3, "window": {"loss": [1.0], "correct": [2.0]}})
    assert set(tensors) == {
        "objective.model.head.bias", "objective.average.model.head.bias", "optimizer.exp_avg.model.blocks.0.norm1.bias"
    }  # fmt: skip
    assert progress == {"step": 3, "window": {"loss": [1.0], "top1": [2.0]}}


def test_a_state_of_another_format_is_refused_with_the_reason(tiny_run, tmp_path):
    run, data = tiny_run
    copy = shutil.copytree(run, tmp_path / "copy")
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**info, "status": "stopped"}))
    path = copy / "last" / "state.safetensors"
    save_file(load_file(path), path, {"format": "1", "progress": "{}"})
    with pytest.raises(ValueError, match="was written by another Vitrail, whose steps compute other numbers"):
        train(data, out=copy, console=QUIET, resume=True)
