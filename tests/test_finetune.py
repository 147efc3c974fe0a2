"""Fine-tuning: any weights to start from, layer by layer, resumed exactly, and better than from scratch."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from test_training import QUIET, assert_same_weights, interrupted, lines_of

from vitrail.api import train
from vitrail.cli import run as vitrail
from vitrail.config import OptimConfig, RunConfig, load_config
from vitrail.config_schema import leaves, override
from vitrail.evaluation.classifier import load
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.optim.groups import layer_of, num_layers, parameter_groups
from vitrail.optim.optimizers import build_optimizer
from vitrail.recipes import DatasetFacts, build_config
from vitrail.training.head_warmup import set_trainable, trainable_parameters
from vitrail.training.start import load_start, pin_revision, start_model
from vitrail.weights.model_file import load_model

SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3)
FACTS = DatasetFacts(2_000, 5, 480, False, 3, "", "cpu", False)
QUICK = {"epochs": 3.0, "batch_size": 16}
GENTLE = {"optim.layer_decay": 0.5, "optim.head_warmup": "4 steps", "schedule.warmup": "2 steps"}


def write_digits(root: Path, digits: tuple[int, ...], per_class: int, *, skip: int = 0) -> Path:
    """Write scikit-learn's digits as class folders of 8-pixel images."""
    stored = load_digits()
    for digit in digits:
        folder = root / str(digit)
        folder.mkdir(parents=True)
        for number in np.flatnonzero(stored.target == digit)[skip : skip + per_class]:
            pixels = (stored.images[number] * 255 / 16).round().astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    """Return a run on the digits 0 to 6."""
    folder = tmp_path_factory.mktemp("digits")
    data = write_digits(folder / "data", tuple(range(7)), 150)
    return train(data, out=folder / "run", console=QUIET, epochs=12.0, model="nano4").folder


def test_a_subset_of_the_classes_is_known_before_any_step(digits_run, tmp_path):
    unseen = write_digits(tmp_path / "data", (5, 2), 25, skip=150)
    changes = {"pretrained": str(digits_run), "model.num_classes": 2}
    config = override(load_config(digits_run / "config.json"), changes)
    start = load_start(config, ("5", "2"))
    model = start_model(config, fresh=True, start=start).eval()
    base = load(digits_run)
    pixels = [base._prepare(path)[1] for digit in "52" for path in sorted((unseen / digit).iterdir())]
    images = base.preprocess.normalise(torch.from_numpy(np.stack(pixels)))
    right = model(images).argmax(dim=1) == torch.arange(2).repeat_interleave(25)
    assert right.float().mean() > 0.9
    assert start.report.head == "all 2 rows found by name among 7 classes"


@pytest.mark.slow
def test_new_classes_are_learned_faster_than_from_scratch(digits_run, tmp_path):
    data = write_digits(tmp_path / "data", (7, 8, 9), 60)
    tuned, scratch = (
        [
            train(data, out=tmp_path / f"{name}-{seed}", model=model, console=QUIET, seed=seed, epochs=4.0).top1
            for seed in range(3)
        ]
        for name, model in (("tuned", str(digits_run)), ("scratch", "nano4"))
    )
    # Seeds 0 to 3 at 3 and at 5 epochs: 86 to 92 % against 58 to 86 %.
    assert np.mean(tuned) > 0.82
    assert np.mean(tuned) > np.mean(scratch) + 0.05


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory) -> Path:
    """Return a run that starts from a small run, with a learning rate for each layer and the head first."""
    base, data = tiny_run
    out = tmp_path_factory.mktemp("tuned") / "run"
    return train(data, out=out, model=str(base), console=QUIET, **QUICK, **GENTLE).folder


def test_a_run_records_what_it_started_from(tuned, tiny_run, make_folder, tmp_path, capsys):
    base, _ = tiny_run
    config = load_config(tuned / "config.json")
    assert (config.pretrained, config.variant) == (str(base), "")
    assert json.loads((tuned / "run.json").read_text())["start"]["origin"] == str(base)
    data = make_folder(tmp_path / "data", classes=("steep", "flat", "zigzag"), count=8)
    arguments = ["train", str(data), "--out", str(tmp_path / "run"), "--model", str(base), "--epochs", "1"]
    assert vitrail([*arguments, "--model.image-size", "24", "--model.num-registers", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    start = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (
        "head: 2 of 3 rows found by name among 3 classes; new: zigzag",
        "pos_embed: 2×2 → 3×3 patches",
        "reg_token",
    ):
        assert text in printed
        assert text.removeprefix("head: ") in page
    assert start["missing"] == ["reg_token"]
    assert set(start["random"]) == {"reg_token", "pos_embed", "head.weight", "head.bias"}
    model, header = load_model(tmp_path / "run" / "model.safetensors")
    assert model.config == header.architecture == load_config(tmp_path / "run" / "config.json").model


def test_the_configuration_of_a_run_starts_from_the_same_weights(tuned, tiny_run, tmp_path):
    again = train(tiny_run[1], out=tmp_path / "again", recipe=str(tuned / "config.json"), console=QUIET).folder
    assert_same_weights(tuned, again)
    fresh = train(
        tiny_run[1], out=tmp_path / "fresh", recipe=str(tuned / "config.json"), model="nano8", epochs=1.0, console=QUIET
    )
    config = load_config(fresh.folder / "config.json")
    assert (config.pretrained, config.variant, config.warms_head) == ("", "nano8", False)


@pytest.mark.parametrize("step", [1, 3, 4, 7])  # in the head's warm-up, at its end, after it
def test_resume_is_bit_exact_and_needs_no_other_file(step, tuned, tiny_run, tmp_path):
    base, data = tiny_run
    copy = shutil.copytree(base, tmp_path / "base")
    cut = interrupted(step, data, out=tmp_path / "cut", model=str(copy), **QUICK, **GENTLE)
    shutil.rmtree(copy)
    train(data, out=cut, resume=True, console=QUIET)
    assert_same_weights(tuned, cut)
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines_of(run)] for run in (tuned, cut)
    ]
    assert timeless[0] == timeless[1]


def test_the_head_learns_alone_at_first(tiny_run, tmp_path):
    base, data = tiny_run
    cut = interrupted(4, data, out=tmp_path / "cut", model=str(base), **QUICK, **GENTLE)
    state, before = load_file(cut / "last" / "state.safetensors"), load_file(base / "model.safetensors")
    moved = {name for name, tensor in before.items() if not torch.equal(state[f"objective.model.{name}"], tensor)}
    assert moved == {"head.weight", "head.bias"}
    assert {name for name in state if "exp_avg." in name} == {f"optimizer.exp_avg.model.{name}" for name in moved}
    cut = interrupted(5, data, out=tmp_path / "next", model=str(base), **QUICK, **GENTLE)
    state = load_file(cut / "last" / "state.safetensors")
    moved = {name for name, tensor in before.items() if not torch.equal(state[f"objective.model.{name}"], tensor)}
    assert "blocks.0.attn.qkv.weight" in moved


def test_what_starts_at_random_learns_with_the_head(tiny_run, tmp_path):
    base, data = tiny_run
    new = {"model.decoder": "concat", "model.num_registers": 1}
    cut = interrupted(3, data, out=tmp_path / "cut", model=str(base), **QUICK, **GENTLE, **new)
    names = {name.split(".", 3)[3] for name in load_file(cut / "last" / "state.safetensors") if "exp_avg." in name}
    joined = {f"decoder.{layer}.{each}" for layer in ("join", "norm") for each in ("weight", "bias")}
    assert names == {"head.weight", "head.bias", "reg_token", *joined}


def test_a_hub_name_is_pinned_to_its_revision():
    assert pin_revision("hf:owner/name", "hf:owner/name@1234") == "hf:owner/name@1234"
    assert pin_revision("hf:owner/name@main", "hf:owner/name@1234") == "hf:owner/name@1234"
    assert pin_revision("runs/a@b", "runs/a@b") == "runs/a@b"
    assert pin_revision("file.pth", "timm:something@1") == "file.pth"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora.rank", "4"]])
def test_two_processes_tune_as_one(more, make_folder, tiny_run, tmp_path):
    base, data = tiny_run[0], make_folder(tmp_path / "data", count=24)
    arguments = ["-m", "vitrail", "train", str(data), "--model", str(base), "--epochs", "3", "--batch-size", "16"]
    arguments += ["--model.drop-path", "0", "--optim.ema-decay", "0", "--optim.head-warmup", "5 steps", *more]
    subprocess.run([sys.executable, *arguments, "--out", str(tmp_path / "one")], check=True, capture_output=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "--out", str(tmp_path / "two")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / name / "last" / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=2e-2)
    start = load_file(base / "model.safetensors")
    learned = "blocks.1.attn.qkv." + ("lora_b" if more else "weight")
    assert not torch.equal(
        one[f"objective.model.{learned}"], start.get(learned, torch.zeros_like(one[f"objective.model.{learned}"]))
    )


def test_learning_rates_of_layers_by_hand():
    model = ViT(ViTConfig(image_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=3, num_heads=3))
    assert num_layers(model) == 4
    groups = build_optimizer(parameter_groups(model, layer_decay=0.5), OptimConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    assert scales["patch_embed.proj.weight"] == (1 / 16, 0.3)
    assert scales["pos_embed"] == scales["cls_token"] == (1 / 16, 0.0)
    assert scales["blocks.0.attn.qkv.weight"] == (1 / 8, 0.3)
    assert scales["blocks.2.norm1.bias"] == (1 / 2, 0.0)
    assert scales["norm.weight"] == (1, 0.0)
    assert scales["head.weight"] == (1, 0.3)
    assert layer_of("decoder.join.weight", 4) == layer_of("fc_norm.bias", 4) == 4
    assert [group.scale for group in parameter_groups(model)] == [1, 1, 1]
    groups = parameter_groups(model, layer_decay=0.5, full_rate=("cls_token",))
    scales = {names[id(p)]: group.scale for group in groups for p in group.params}
    assert scales["cls_token"] == 1, "what starts at random learns at the full rate"
    assert scales["pos_embed"] == 1 / 16


def test_batch_norms_that_do_not_learn_yet_keep_their_statistics():
    model = start_model(override(RunConfig(model=SMALL), {"model.encoder": "resnet18"}), fresh=True)
    all_learning = trainable_parameters(model)
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    set_trainable(model, all_learning, {name: p for name, p in all_learning.items() if name.startswith("head.")})
    model(torch.rand(4, 3, 32, 32))
    assert torch.equal(norm.running_mean, before)
    set_trainable(model, all_learning, all_learning)
    model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(norm.running_mean, before)


def test_resume_takes_the_same_model_spec_also_when_the_weights_have_gone(tiny_run, tmp_path, monkeypatch):
    base, data = tiny_run
    weights = tmp_path / "weights"
    shutil.copytree(base, weights)
    monkeypatch.chdir(tmp_path)
    train(data, model="weights", out="run", epochs=1, console=QUIET)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pretrained"] == str(weights)
    shutil.rmtree(weights)
    train(data, model="weights", out="run", resume=True, console=QUIET)
    with pytest.raises(ValueError, match=r"with pretrained '.*weights', not '.*others'"):
        train(data, model="others", out="run", resume=True, console=QUIET)


def test_layers_frozen_at_the_front_keep_nothing_for_the_backward_pass():
    front = ("patch_embed", "cls_token", "pos_embed", "blocks.0")
    model = start_model(override(RunConfig(model=SMALL), {"optim.freeze": front}), fresh=True)
    features = model.features(torch.rand(2, 3, 32, 32))
    assert features["encoder"].grad_fn is None
    assert features["blocks.0"].grad_fn is None
    assert features["blocks.1"].grad_fn is not None
    features["logits"].sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is None


def test_auto_keeps_the_architecture_and_preprocessing_of_the_weights(tuned):
    header = load(tuned).header
    config, choices = build_config("auto", FACTS, {"pretrained": str(tuned)}, header)
    assert (
        config.model
        == override(
            RunConfig(model=header.architecture), {"model.num_classes": 5, "model.drop_path": config.model.drop_path}
        ).model
    )
    for name, value in leaves(config.preprocess):
        assert value == getattr(header.preprocess, name)
    assert config.warms_head
    assert config.optim.layer_decay < 1
    scratch, _ = build_config("auto", FACTS, {})
    assert config.epochs < scratch.epochs
    assert all(choice.reason for choice in choices)
    given = {"pretrained": str(tuned), "optim.lr": 1e-5, "epochs": 2.0, "model.image_size": 32, "model.drop_path": 0.3}
    values = dict(leaves(build_config("auto", FACTS, given, header)[0]))
    assert {name: values[name] for name in given} == given
    uneven = dataclasses.replace(FACTS, class_sizes=(20, 900))
    config, choices = build_config("auto", uneven, {"pretrained": str(tuned)}, header)
    assert config.data.sampling == "natural"
    assert [choice.reason[:27] for choice in choices if choice.setting == "data.sampling"] == [
        "classes have 20 to 900 imag"
    ]
    article, _ = build_config("article", FACTS, {"pretrained": str(tuned)}, header)
    assert (article.optim.lr, article.model.depth, article.preprocess.mean) == (3e-5, 2, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.embed_dim": 48}, r"model\.embed_dim 48 \(they have 24\)"),
        ({"model.depth": 9}, r"model\.depth 9 \(they have 2\)"),
        ({"lora.alpha": 8.0}, r"lora\.alpha 8\.0 has no effect with lora\.rank 0"),
        ({"lora.targets": ["qkv"]}, "has no effect"),
        ({"optim.head_warmup": "100 %"}, "shorten it"),
        ({"optim.head_warmup": "soon"}, "expected a duration"),
        ({"optim.layer_decay": 1.5}, r"optim\.layer_decay is 1\.5"),
        ({"optim.freeze": ["head"]}, "holds it"),
        ({"encoder_weights": "timm"}, "leave one of them out"),
        ({"variant": "nano8"}, "both say what the model is"),
        ({"preprocess.mean": [0.5, 0.5, 0.5]}, "belong together"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(settings, message, tiny_run, tmp_path):
    base, data = tiny_run
    with pytest.raises(ValueError, match=message):
        train(data, out=tmp_path / "run", pretrained=str(base), console=QUIET, **settings)
    assert not (tmp_path / "run").exists()


def test_a_head_warmup_needs_trained_weights(make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=5)
    with pytest.raises(ValueError, match="all of these start at random"):
        train(data, out=tmp_path / "run", console=QUIET, **{"optim.head_warmup": "1 epochs"})
    with pytest.raises(ValueError, match="no such run folder or model file"):
        train(data, out=tmp_path / "run", console=QUIET, model=str(tmp_path / "gone.safetensors"))
