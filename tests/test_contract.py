"""What every architecture keeps: encoder × positions × attention × decoder, in any combination."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ATTENTION_NAMES, DECODER_NAMES, POSITION_NAMES, ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights.model_file import ModelHeader, load_model, save_model

# r50 has stride 16 at least; the others' small maps leave more patches to get wrong.
ENCODERS = {"patch": 8, "conv": 8, "r50": 16, "resnet18": 8, "efficientnet_b0": 8, "convnext_atto": 8}
QUICK = ("patch", "conv", "resnet18")
SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=3, num_registers=1)
# Attention sees the feature map, not what made it: one encoder and one CNN stand for all with local attention.
COMBINATIONS = [
    each
    for each in itertools.product(ENCODERS, POSITION_NAMES, ATTENTION_NAMES, DECODER_NAMES)
    if each[2] == "global" or each[0] in ("patch", "resnet18")
]


def config_of(encoder: str, positions: str, attention: str, decoder: str) -> ViTConfig:
    return dataclasses.replace(
        SMALL,
        encoder=encoder,
        patch_size=ENCODERS[encoder],
        positions=positions,
        attention=attention,
        window=3 if attention == "local" else 0,
        decoder=decoder,
        layer_scale=0.5,
        qk_norm=decoder == "mean",
        mlp="swiglu" if positions == "rope2d" else "gelu",
        init="mimetic" if decoder == "concat" else "normal",
    )


# What the quick tests leave to `make test`: CNNs that are slow to build, with all that a quicker CNN shows too.
MARKED = [pytest.param(*each, marks=[] if each[0] in QUICK else [pytest.mark.slow]) for each in COMBINATIONS]


@pytest.mark.parametrize(("encoder", "positions", "attention", "decoder"), MARKED)
def test_every_combination(tmp_path, encoder, positions, attention, decoder):
    config = config_of(encoder, positions, attention, decoder)
    model = ViT(config)
    unset = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    assert not unset, "a parameter was not initialised"

    images = torch.rand(2, 3, 32, 32)
    assert model.patch_embed(images).shape == (2, 24, *config.grid)
    with torch.no_grad():  # timm starts the last norm of a residual branch at zero, which holds back the first gradient
        for name, parameter in model.named_parameters():
            if name.startswith("patch_embed.backbone") and parameter.ndim == 1:
                parameter.add_(0.3)
    model(images).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert not still, "a parameter without a gradient never learns"

    model.eval()
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.equal(model(images), logits)
    features = model.features(images)
    assert_close(features["logits"], logits, atol=0, rtol=0)
    assert features["transformer"].shape == (2, config.num_prefix + config.grid[0] * config.grid[1], 24)
    assert_close(model(images[:1]), logits[:1], atol=1e-5, rtol=1e-5)
    assert model(images[:0]).shape == (0, 7)
    patch = config.patch_size
    assert model(torch.rand(1, 3, 3 * patch, 2 * patch + 1)).shape == (1, 7)
    with pytest.raises(ValueError, match=f"smaller than a patch of {patch}×{patch}"):
        model(torch.rand(1, 3, patch, patch - 1))

    header = ModelHeader(config, tuple("abcdefg"), Preprocess(image_size=32))
    save_model(tmp_path / "model.safetensors", model.state_dict(), header)
    loaded, read = load_model(tmp_path / "model.safetensors")
    assert read.architecture == config
    assert torch.equal(loaded(images), logits)

    different = [torch.rand(3, 32, 32), torch.rand(3, 48, 16), torch.rand(3, 17, 40), torch.rand(3, 48, 16)]
    alone = torch.cat([model(image[None]) for image in different])
    assert_close(model.forward_packed(different), alone, atol=1e-5, rtol=1e-5)


PROGRAM = """
import dataclasses, sys, torch
from torch.testing import assert_close
sys.path.insert(0, sys.argv[1])
from test_contract import COMBINATIONS, config_of
from vitrail import ViT
torch.manual_seed(0)
chosen = [each for each in COMBINATIONS if each[0] == sys.argv[2]]
for combination in chosen[::4 if len(chosen) < 40 else 7]:  # all positions, all decoders; each takes seconds
    dropped = 0.2 if combination[2] == "global" else 0.0
    config = dataclasses.replace(config_of(*combination), depth=1, drop_path=0.3, patch_dropout=dropped)
    model, images = ViT(config), torch.rand(4, 3, 32, 32)
    torch._dynamo.reset()
    # Training too: a graph break in stochastic depth or patch dropout would cost most there.
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(images).sum().backward()
    model.eval()
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    for count in (1, 3):
        batch = torch.rand(count, 3, 32, 32)
        assert_close(exported(batch), model(batch), atol=1e-5, rtol=1e-5)
print("agreed")
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["patch", "conv", "resnet18", "efficientnet_b0"])
def test_compiles_and_exports_without_a_graph_break(encoder):
    # In a process of its own: the executed shape annotations of the tests are no part of what users compile.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(Path(__file__).parent), encoder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agreed", done.stderr[-3000:]
