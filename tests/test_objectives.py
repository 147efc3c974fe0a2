"""The loop knows no classification: a second objective trains, resumes and runs on two ranks through it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import Agreement, build_agreement
from safetensors.torch import load_file

from vitrail.config import OptimConfig, RunConfig
from vitrail.data.loading.train_loader import Batch
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.objectives.classification import Classification
from vitrail.optim.groups import parameter_groups
from vitrail.optim.optimizers import OPTIMIZERS, build_optimizer, set_lr
from vitrail.weights.adapt import Start
from vitrail.weights.model_file import load_model

PROGRAM = Path(__file__).with_name("agreement.py")
NO_IMAGES = torch.zeros(0)


def words(data: Path, out: Path, *more: str, ranks: int = 1) -> list[str]:
    launch = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    )
    return [*launch, str(PROGRAM), str(data), str(out), *more]


def run(*given: str) -> None:
    done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "state.safetensors")


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_objective_without_labels_trains_and_resumes_exactly_after_sigkill(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=24)
    run(*words(data, tmp_path / "whole"))
    losses = [line["train/loss"] for line in lines_of(tmp_path / "whole") if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0], "it learns"
    evaluations = [line for line in lines_of(tmp_path / "whole") if "eval/spread" in line]
    assert len(evaluations) == 4
    assert {"eval/spread", "eval/num_images"} <= set(evaluations[0])
    assert "eval/top1" not in evaluations[0]
    model, header = load_model(tmp_path / "whole" / "model.safetensors")
    assert header.labels == ()
    assert model.config.num_classes == 0
    best = max(line["eval/spread"] for line in evaluations)
    assert header.metrics["spread"] == best, "its own idea of better chose the weights"

    killed = subprocess.Popen(words(data, tmp_path / "cut"), env=environment(), stderr=subprocess.DEVNULL)
    saved = tmp_path / "cut" / "last" / "state.safetensors"
    until = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was still training"
    run(*words(data, tmp_path / "cut"))
    ours, theirs = state_of(tmp_path / "cut"), state_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("objective.teacher.model.blocks.0") for name in ours)
    assert any(name.startswith("optimizer.exp_avg.predictor") for name in ours)
    assert not any(name.startswith("optimizer.exp_avg.teacher") for name in ours), "a teacher is not optimised"
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_train_the_objective_as_one(make_folder, tmp_path):
    """Gradients are averaged over the ranks' halves of each batch; dropout is each rank's own, so it is off here."""
    data = make_folder(tmp_path / "data", count=24)
    run(*words(data, tmp_path / "one", "--model.dropout", "0", "--epochs", "1"))
    run(*words(data, tmp_path / "two", "--model.dropout", "0", "--epochs", "1", ranks=2))
    ours, theirs = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    for name, value in theirs.items():
        if name.startswith("objective."):
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        for name in {"train/loss", "train/cosine", "eval/spread", "eval/num_images"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-3), name


def test_views_of_an_image_differ_and_are_the_same_again(tmp_path, make_folder):
    from vitrail.config_schema import override
    from vitrail.console import Console
    from vitrail.data.setup import build_train_data, load_data
    from vitrail.distributed import World

    data = make_folder(tmp_path / "data", count=8)
    settings = {"data.source": str(data), "model.image_size": 32, "model.patch_size": 8, "batch_size": 6}
    settings |= {"augment.crop_scale": 0.5, "augment.mixup": 0.5}
    config = override(RunConfig(), settings)
    train = build_train_data(load_data(config.data, Console(quiet=True), channels=3), config)

    def batches(views: int, world: World = World()) -> list[Batch]:  # noqa: B008 - frozen
        return list(train.loader(config, torch.device("cpu"), world, num_views=views).batches(0, 3))

    for single, double, again in zip(batches(1), batches(2), batches(2), strict=True):
        assert single.views == ()
        assert len(double.views) == 2
        assert torch.equal(single.images, double.images), "the first view is what one view alone is, mixed"
        assert not torch.equal(double.images, double.views[0]), "views are not mixed"
        assert not torch.equal(*double.views)
        assert all(torch.equal(one, two) for one, two in zip(double.views, again.views, strict=True))
        assert [len(view) for view in double.take(1, 4).views] == [3, 3]
    halves = [batches(2, World(rank, 2, rank, 2)) for rank in range(2)]
    for whole, one, two in zip(batches(2), *halves, strict=True):
        for view in range(2):
            assert torch.equal(whole.views[view], torch.cat([one.views[view], two.views[view]]))


def test_groups_tell_hidden_matrices_from_the_rest():
    model = ViT(ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3))
    groups = {group.name: group for group in parameter_groups(Classification(model, ema_decay=0.9), [model])}
    assert set(groups) == {"matrix", "other", "vector"}
    assert [parameter.shape for parameter in groups["matrix"].params[:4]] == [(48, 16), (16, 16), (64, 16), (16, 64)]
    assert len(groups["matrix"].params) == 2 * 4
    assert {parameter.ndim for parameter in groups["other"].params} == {2, 4}, "the head and the patch kernel"
    assert [groups[name].decay for name in ("matrix", "other", "vector")] == [True, True, False]
    learned = sum(parameter.numel() for group in groups.values() for parameter in group.params)
    assert learned == sum(parameter.numel() for parameter in model.parameters()), "each once, and not the average's"


def test_layers_of_an_objective_learn_at_their_rates():
    model = ViT(ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3))
    groups = parameter_groups(Classification(model), [model], layer_decay=0.5, full_rate={"cls_token"})
    scales = {id(parameter): group.scale for group in groups for parameter in group.params}
    assert scales[id(model.patch_embed.proj.weight)] == 0.5**3
    assert [scales[id(block.norm1.weight)] for block in model.blocks] == [0.5**2, 0.5]
    assert scales[id(model.head.weight)] == 1.0
    assert scales[id(model.cls_token)] == 1.0, "asked for"
    optimizer = build_optimizer(groups, OptimConfig(weight_decay=0.3))
    set_lr(optimizer, 1e-2)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1.25e-3, 2.5e-3, 5e-3, 1e-2]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


def test_layers_are_those_of_the_vits_wherever_they_stand():
    """A nested student's blocks are found, a decoder's own blocks are no layers, and a setting that does nothing is refused."""
    config = ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    student = ViT(config)
    objective = torch.nn.ModuleDict({"student": torch.nn.ModuleDict({"backbone": student}), "decoder": ViT(config)})
    groups = parameter_groups(objective, [student], layer_decay=0.5)
    scales = {id(parameter): group.scale for group in groups for parameter in group.params}
    assert [scales[id(block.norm1.weight)] for block in student.blocks] == [0.25, 0.5]
    assert {scales[id(parameter)] for parameter in objective["decoder"].parameters()} == {1.0}
    kinds = {id(parameter): group.kind for group in groups for parameter in group.params}
    assert kinds[id(student.blocks[0].mlp.fc1.weight)] == "matrix"
    with pytest.raises(ValueError, match=r"optim\.layer_decay is 0\.5, but the model has no blocks"):
        parameter_groups(torch.nn.Linear(2, 2), layer_decay=0.5)


def test_the_configuration_names_the_optimizers_that_there_are():
    from vitrail.config import OPTIMIZER_NAMES

    assert set(OPTIMIZER_NAMES) == set(OPTIMIZERS)
    with pytest.raises(ValueError, match=r"optim\.name 'adamW2'; did you mean 'adamw'"):
        OptimConfig(name="adamW2")


def test_figures_of_an_objective_are_sums_with_a_count():
    config = RunConfig(model=ViTConfig(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2))
    objective = build_agreement(config, Start(), True)
    assert isinstance(objective, Agreement)
    views = (torch.randn(5, 3, 16, 16), torch.randn(5, 3, 16, 16))
    with torch.no_grad():
        figures = objective(Batch(views[0], NO_IMAGES, np.arange(5), views=views))
    assert float(figures["count"]) == 5
    assert float(figures["loss"]) == pytest.approx(1 - float(figures["cosine"]) / 5, abs=1e-5)
    before = objective.teacher.model.blocks[0].norm1.weight.clone()
    with torch.no_grad():
        objective.student.blocks[0].norm1.weight.add_(1.0)
    objective.after_step(1)
    assert not torch.equal(before, objective.teacher.model.blocks[0].norm1.weight)
