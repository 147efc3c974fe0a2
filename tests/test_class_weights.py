"""Loss weights: torch's own up to their norm, the same in sub-batches and processes, recorded, from tables too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.api import train
from vitrail.cli import run as vitrail
from vitrail.config import OptimConfig, RunConfig
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.data.datasets.base import ArrayDataset
from vitrail.data.loading.class_weights import class_weights, loss_weights, mean_weights
from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.objectives.classification import Classification
from vitrail.optim.groups import parameter_groups
from vitrail.optim.optimizers import build_optimizer
from vitrail.training.parallelize import ParallelObjective
from vitrail.training.state import Progress, State
from vitrail.training.step import update

SIZES = np.asarray([60, 12, 3, 0])
TARGETS = np.repeat(np.arange(4), SIZES)
DATASET = ArrayDataset(
    name="test",
    labels=("a", "b", "c", "d"),
    paths=[str(number) for number in range(75)],
    targets=TARGETS,
    arrays=(np.zeros((75, 8, 8), np.uint8),),
)
EVERYTHING = np.arange(75)
MODEL = ViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=4, embed_dim=16, depth=1, num_heads=2)


def test_class_weights_are_what_the_papers_say():
    inverse = class_weights(SIZES, OptimConfig(class_weights="inverse"))
    np.testing.assert_allclose(inverse, [1 / 60, 1 / 12, 1 / 3, 0])
    effective = class_weights(SIZES, OptimConfig(class_weights="effective", effective_beta=0.9))
    np.testing.assert_allclose(effective[:3], [0.1 / (1 - 0.9**n) for n in (60, 12, 3)])
    # The two limits that Cui et al. name: beta 0 is no weighting, beta to 1 is the inverse of the size.
    even = class_weights(SIZES, OptimConfig(class_weights="effective", effective_beta=0.0))
    np.testing.assert_array_equal(even, [1, 1, 1, 0])
    near = class_weights(SIZES, OptimConfig(class_weights="effective", effective_beta=1 - 1e-9))
    np.testing.assert_allclose(near, inverse, rtol=1e-6)


def test_weights_are_one_on_average_over_the_training_split():
    own = np.random.default_rng(0).uniform(0.1, 5.0, 75)
    indices = np.delete(EVERYTHING, [3, 62, 74])
    for kind in ("inverse", "effective"):
        optim = OptimConfig(class_weights=kind)
        for dataset in (DATASET, replace(DATASET, weights=own)):
            weights = loss_weights(dataset, indices, optim)
            assert weights is not None
            assert weights[indices].mean() == pytest.approx(1.0)
            assert np.isfinite(weights).all()
            both = class_weights(np.asarray([59, 11, 2, 0]), optim)[TARGETS] * (
                dataset.weights if dataset.weights is not None else 1
            )
            np.testing.assert_allclose(weights / weights[0], both / both[0])
    assert loss_weights(DATASET, indices, OptimConfig()) is None
    only_own = loss_weights(replace(DATASET, weights=own), indices, OptimConfig())
    np.testing.assert_allclose(only_own, own / own[indices].mean())


def test_inverse_weights_let_each_class_count_alike():
    weights = loss_weights(DATASET, EVERYTHING, OptimConfig(class_weights="inverse"))
    assert weights is not None
    np.testing.assert_allclose(np.bincount(TARGETS, weights), [25, 25, 25])
    assert mean_weights(DATASET, EVERYTHING, weights) == {"a": 0.416667, "b": 2.083333, "c": 8.333333}


class FixedLogits(nn.Module):
    """A model that returns the logits it was made with."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor, patch_size: int | None) -> torch.Tensor:
        return self.logits


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_up_to_the_norm(smoothing):
    targets = torch.randint(3, (32,))
    by_class = torch.tensor([0.5, 2.0, 7.0])
    model = FixedLogits(torch.randn(32, 3))
    batch = Batch(torch.zeros(32, 1, 8, 8), targets, np.arange(32), weights=by_class[targets])
    found = Classification(model, label_smoothing=smoothing)(batch)["loss"]  # pyright: ignore[reportArgumentType]
    if not smoothing:
        theirs = F.cross_entropy(model.logits, targets, weight=by_class)
        torch.testing.assert_close(found, theirs * by_class[targets].sum() / 32)
    # With smoothing torch weights every label of the smoothed target by its own class; ours weights the image.
    each = F.cross_entropy(model.logits, targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(found, (each * by_class[targets]).sum() / 32)
    (gradient,) = torch.autograd.grad(found, model.logits)
    (single,) = torch.autograd.grad(each[5], model.logits)
    torch.testing.assert_close(gradient[5], single[5] * by_class[targets[5]] / 32)


def test_weights_of_one_change_nothing():
    batch = Batch(torch.zeros(32, 1, 8, 8), torch.randint(3, (32,)), np.arange(32))
    objective = Classification(FixedLogits(torch.randn(32, 3)), label_smoothing=0.1)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(objective(batch)["loss"], objective(replace(batch, weights=torch.ones(32)))["loss"])


def test_sub_batches_add_up():
    batch = Batch(torch.randn(12, 1, 8, 8), torch.randint(4, (12,)), np.arange(12), weights=torch.rand(12) + 0.1)
    weights = []
    for accumulate in (1, 3):
        config = override(RunConfig(), {"optim.accumulate": accumulate, "batch_size": 12, "optim.clip_norm": 0.0})
        torch.manual_seed(0)
        model = ViT(MODEL).train()
        objective = Classification(model)
        state = State(objective, build_optimizer(parameter_groups(objective), config.optim), Progress())
        session = SimpleNamespace(config=config, device=torch.device("cpu"))
        update(ParallelObjective(objective, config, World()), state, batch, session)  # type: ignore[arg-type]
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=2e-5)


def test_a_run_trains_with_loss_weights_and_records_them(make_folder, tmp_path: Path, tiny: dict):
    data = make_folder(tmp_path / "data")
    for number in range(14):
        (data / "steep" / f"{number:03d}.png").unlink()
    lines = {}
    for kind in ("none", "inverse"):
        run = train(
            data, out=tmp_path / kind, console=Console(quiet=True), **tiny, **{"optim.class_weights": kind}
        ).folder
        lines[kind] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        recorded = json.loads((run / "run.json").read_text()).get("loss_weights")
        if kind == "none":
            assert recorded is None
        else:
            counts = np.asarray([16, 16, 5])
            wanted = counts.sum() / counts / 3
            assert recorded == {
                n: round(w, 6) for n, w in zip(("flat", "slant", "steep"), wanted.tolist(), strict=True)
            }
    first = [next(line["train/loss"] for line in each if "train/loss" in line) for each in lines.values()]
    assert first[0] != first[1]


def test_uneven_classes_are_reported_at_the_start_and_in_every_evaluation(make_folder, tmp_path: Path, capsys):
    data = make_folder(tmp_path / "data", count=60)
    for label, kept in (("steep", 4), ("slant", 30)):
        for path in sorted((data / label).iterdir())[kept:]:
            path.unlink()
    words = ["--model", "nano8", "--model.depth", "1", "--model.embed-dim", "24", "--epochs", "1"]
    words += ["--model.num-heads", "2"]
    assert vitrail(["train", str(data), "--out", str(tmp_path / "run"), *words]) == 0
    output = capsys.readouterr().out
    assert "--data.sampling sqrt: classes have 3 to 48 images" in output
    assert "mean recall of the classes" in output
    assert vitrail(["eval", str(tmp_path / "run"), str(data), "--out", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert f"mean recall of the classes {found['balanced_accuracy']:.2%}" in capsys.readouterr().out
