"""Low-rank adapters: nothing changes before the first step, only they learn, and they merge into plain weights."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_training import QUIET, assert_same_weights, interrupted
from torch.testing import assert_close

from vitrail.api import train
from vitrail.cli import run as vitrail
from vitrail.config import RunConfig
from vitrail.config_schema import override
from vitrail.models.config import ViTConfig
from vitrail.models.lora import LoraLinear, add_adapters, is_adapter, merged
from vitrail.models.vit import ViT
from vitrail.weights.model_file import load_model

SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3)
ALL = ("qkv", "proj", "fc1", "fc2")
LORA = {"lora.rank": 3, "epochs": 2.0, "batch_size": 16}


def adapted(config: ViTConfig = SMALL, *, trained: bool = True, targets: tuple[str, ...] = ALL) -> ViT:
    model = ViT(config).eval()
    add_adapters(model, 3, 6.0, targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b") and trained:
                parameter.normal_(std=0.3)
    return model


def test_one_layer_by_hand():
    layer = LoraLinear(torch.nn.Linear(2, 2), 1, 4.0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
        layer.lora_a.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_b.copy_(torch.tensor([[0.5], [0.0]]))
    assert layer(torch.tensor([3.0, 5.0])).tolist() == [3 + 1 + 4 * 0.5 * 13, 5]
    assert layer.merged().weight.tolist() == [[3.0, 4.0], [0.0, 1.0]]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_merged_is_a_plain_model_that_computes_the_same(mlp):
    config = dataclasses.replace(SMALL, mlp=mlp, qkv_bias=False)
    model, images = adapted(config), torch.rand(4, 3, 32, 32)
    plain = merged(model)
    assert_close(plain(images), model(images), atol=1e-5, rtol=1e-5)
    assert plain.state_dict().keys() == ViT(config).state_dict().keys()
    assert any(is_adapter(name) for name in model.state_dict()), "the model that learns keeps its adapters"
    base = ViT(config).eval()
    base.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)})
    assert (base(images) - plain(images)).abs().max() > 1e-3
    assert merged(base) is base


def test_nothing_changes_before_the_first_step():
    torch.manual_seed(3)
    base = ViT(SMALL).eval()
    images = torch.rand(4, 3, 32, 32)
    expected = base(images)
    add_adapters(base, 3, 6.0, ALL)
    assert torch.equal(base(images), expected)


def test_each_target_is_the_layer_that_it_names():
    for target, layer in {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}.items():
        names = [name for name in adapted(targets=(target,)).state_dict() if is_adapter(name)]
        assert names == [f"blocks.{i}.{layer}.lora_{side}" for i in range(2) for side in "ab"]


def test_adapters_learn_in_bfloat16_and_compiled():
    model, images = adapted().train(), torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images)
        low.float().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if is_adapter(name))
    assert_close(low.float(), model(images), atol=0.1, rtol=0.1)


PROGRAM = """
import torch
from torch.testing import assert_close
from vitrail import ViT, ViTConfig
from vitrail.models.lora import add_adapters
torch.manual_seed(0)
model = ViT(ViTConfig(image_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3)).train()
add_adapters(model, 3, 6.0, ("qkv", "fc2"))
images = torch.rand(4, 3, 32, 32)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)
for module in (model.blocks, model.patch_embed):  # as the head's warm-up does
    module.requires_grad_(not next(module.parameters()).requires_grad)
    compiled(images).sum().backward()
print("agreed")
"""


@pytest.mark.slow
def test_adapters_compile_without_a_graph_break():
    # In a process of its own: the executed shape annotations of the tests are no part of what users compile.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr[-3000:]


@pytest.fixture(scope="module")
def lora_run(tiny_run, tmp_path_factory):
    """Return a run with adapters that goes on from a small run, on the same data."""
    base, data = tiny_run
    out = tmp_path_factory.mktemp("lora") / "run"
    train(data, out=out, model=str(base), console=QUIET, **LORA)
    return out


def test_only_adapters_and_head_learn(lora_run, tiny_run):
    base, state = load_file(tiny_run[0] / "model.safetensors"), load_file(lora_run / "last" / "state.safetensors")
    learned = {name.split(".", 3)[3] for name in state if name.startswith("optimizer.exp_avg.")}
    wanted = {f"blocks.{i}.attn.{layer}.lora_{side}" for i in range(2) for layer in ("qkv", "proj") for side in "ab"}
    assert learned == wanted | {"head.weight", "head.bias"}
    for name, tensor in base.items():
        assert torch.equal(state[f"objective.model.{name}"], tensor) == (name not in learned), name
    info = json.loads((lora_run / "run.json").read_text())
    assert info["num_learning"] == sum(state[f"objective.model.{name}"].numel() for name in learned)
    assert info["num_learning"] < info["num_parameters"] / 5


def test_the_model_file_is_plain_and_is_what_was_evaluated(lora_run, tiny_run, tmp_path):
    model, header = load_model(lora_run / "model.safetensors")
    assert model.state_dict().keys() == load_file(lora_run / "model.safetensors").keys()
    base = load_file(tiny_run[0] / "model.safetensors")
    assert not torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], base["blocks.0.mlp.fc1.weight"])
    assert vitrail(["eval", str(lora_run), str(tiny_run[1]), "--out", str(tmp_path / "e.json")]) == 0
    metrics = json.loads((tmp_path / "e.json").read_text())
    lines = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    assert metrics["loss"] in [line.get("eval/loss") for line in lines]
    assert header.labels == ("flat", "slant", "steep")


@pytest.mark.parametrize("step", [2, 5])
def test_resume_is_bit_exact(step, lora_run, tiny_run, tmp_path):
    base, data = tiny_run
    cut = interrupted(step, data, out=tmp_path / "cut", model=str(base), **LORA)
    train(data, out=cut, resume=True, console=QUIET)
    assert_same_weights(lora_run, cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 4}, r"lora\.rank 4 adapts trained weights"),
        ({"lora.rank": 1000, "pretrained": "x"}, r"lora\.rank is 1000; expected at most model\.embed_dim 768"),
        ({"lora.rank": -1}, r"lora\.rank is -1"),
        ({"lora.targets": ["qvk"]}, "did you mean 'qkv'"),
        ({"lora.targets": []}, "one or more"),
        ({"lora.alpha": 0.0}, "above 0"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        override(RunConfig(), changes)
