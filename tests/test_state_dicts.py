"""Weights files without a header: the naming scheme is recognised, the architecture inferred, and each assumption reported."""

import argparse
import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import assert_same_logits, redrawn, write_photographs
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from vit_pytorch import ViT as LucidViT
from vit_pytorch.simple_vit import SimpleViT

from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.tensor_files import load_pickle
from vitrail.weights import naming
from vitrail.weights.key_mapping import to_ours, to_theirs
from vitrail.weights.resolve import open_weights

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
CROP = Compose(
    [Resize(36, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(),
     Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)  # fmt: skip
HALF = Compose([Resize((32, 32)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
LUCID = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 2, "mlp_dim": 80}

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"))


def state(model: nn.Module) -> State:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def renamed(tensors: State, *changes: tuple[str, str]) -> State:
    """Return tensors with regular expressions in their names replaced."""
    for pattern, by in changes:
        tensors = {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}
    return tensors


def in_dinov2s_words(model: VisionTransformer) -> State:
    """Return timm's model as the original repository names it: the class token's own position, registers without."""
    tensors = renamed(
        state(model), ("^reg_token$", "register_tokens"), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")
    )
    row = torch.randn(1, 1, 48)
    return tensors | {
        "cls_token": tensors["cls_token"] - row,
        "pos_embed": torch.cat([row, tensors["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 48),
    }


# name → (source model, its file's content from its state dict, what is left out)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable, tuple[str, ...]]] = {
    "deit": (lambda: VisionTransformer(**SHAPE), lambda model: {"model": state(model)}, ()),
    "deit-distilled": (lambda: VisionTransformerDistilled(**SHAPE), lambda model: {"model": state(model)}, ()),
    "deit3": (
        lambda: VisionTransformer(**SHAPE, init_values=0.1, no_embed_class=True),
        lambda model: {"model": renamed(state(model), (r"ls(\d)\.gamma", r"gamma_\1"))},
        (),
    ),
    "mae-fine-tuned": (
        lambda: VisionTransformer(**SHAPE, global_pool="avg"),
        lambda model: {"model": state(model), "optimizer": {}, "args": argparse.Namespace(lr=1.0)},
        (),
    ),
    "mae": (
        lambda: VisionTransformer(**{**SHAPE, "num_classes": 0}),
        lambda model: {"model": {**state(model), "mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(2)}},
        ("mask_token", "decoder_embed.weight"),
    ),
    "dino": (
        lambda: VisionTransformer(**{**SHAPE, "num_classes": 0}),
        lambda model: {
            "student": {},
            "teacher": {
                **renamed(state(model), ("^", "module.backbone.")),
                "module.head.mlp.0.weight": torch.zeros(2),
                "module.head.last_layer.weight_v": torch.zeros(2),
            },
        },
        ("head.mlp.0.weight", "head.last_layer.weight_v"),
    ),
    "dinov2": (
        lambda: VisionTransformer(
            **{**SHAPE, "num_classes": 0}, init_values=0.1, reg_tokens=4, no_embed_class=True,
            mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=3.0,
        ),
        in_dinov2s_words,
        ("mask_token",),
    ),
    "dinov2-chunks": (
        lambda: VisionTransformer(**{**SHAPE, "num_classes": 0}, init_values=0.1),
        lambda model: {
            **renamed(state(model), (r"^blocks\.", "blocks.0.")), "mask_token": torch.zeros(1, 48)
        },
        ("mask_token",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_original_files(tmp_path, photographs, family):
    build, content, left_out = FAMILIES[family]
    model = redrawn(build())
    torch.save(content(model), tmp_path / "a.pth")
    imported = open_weights(tmp_path / "a.pth", {"num_heads": 3, "crop_fraction": 32 / 36})
    assert imported.report.unexpected == left_out
    assert_same_logits(imported, model, CROP, photographs)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_timms_names_without_a_name(tmp_path, photographs, suffix):
    model = redrawn(VisionTransformer(**SHAPE, reg_tokens=2, no_embed_class=True, qk_norm=True))
    file = tmp_path / f"a.{suffix}"
    save_file(state(model), file) if suffix == "safetensors" else torch.save({"state_dict": state(model)}, file)
    with pytest.raises(ValueError, match=r"do not tell mean, std; .*--to vitrail --describe mean=0.5 std=0.5"):
        open_weights(file)
    description = {
        "mean": (0.5,),
        "std": (0.5,),
        "resize": "squash",
        "interpolation": "bilinear",
        "labels": tuple("abcde"),
    }
    imported = open_weights(file, description)
    assert imported.header.labels == tuple("abcde")
    assert_same_logits(imported, model, HALF, photographs)


@pytest.mark.parametrize("kind", ["cls", "mean", "simple"])
def test_vit_pytorch(tmp_path, photographs, kind):
    shape = {**LUCID, "heads": 2}
    model = redrawn(SimpleViT(**shape) if kind == "simple" else LucidViT(**shape, pool=kind))
    save_file(state(model), tmp_path / "a.safetensors")
    description = {"mean": 0.5, "std": 0.5, **({"image_size": 32} if kind == "simple" else {})}
    imported = open_weights(tmp_path / "a.safetensors", description)
    assert "num_heads 2 assumed: heads of 64" in imported.report.notes
    assert imported.header.architecture.head_dim == 64
    assert_same_logits(imported, model, HALF, photographs)
    if kind == "simple":
        with pytest.raises(ValueError, match="do not tell image_size"):
            open_weights(tmp_path / "a.safetensors", {"mean": 0.5, "std": 0.5})


@pytest.mark.parametrize("kind", ["cls", "simple", "old"])
def test_vit_pytorch_tables_in_both_directions_are_bit_equal(kind):
    model = SimpleViT(**LUCID, heads=2) if kind == "simple" else LucidViT(**LUCID, heads=2)
    before = state(redrawn(model))
    if kind == "old":
        before = renamed(
            before,
            (r"(layers\.\d+\.0)\.to_", r"\1.fn.to_"),
            (r"(layers\.\d+\.1)\.net\.0", r"\1.norm"),
            (r"(layers\.\d+\.1)\.net\.1", r"\1.fn.net.0"),
            (r"(layers\.\d+\.1)\.net\.4", r"\1.fn.net.3"),
            (r"^mlp_head\.", "mlp_head.1."),
            (r"^transformer\.norm\.", "mlp_head.0."),
        )
        before = {name: tensor for name, tensor in before.items() if not re.match(r"to_patch_embedding\.[13]", name)}
        before = renamed(before, (r"to_patch_embedding\.2", "to_patch_embedding.1"))
        before |= {name: before[name][None] for name in ("cls_token", "pos_embedding")}
    rules = naming.vit_pytorch(before)
    ours, unknown = to_ours(before, rules, ViTConfig())
    after, lost = to_theirs(ours, rules, ViTConfig())
    assert not unknown + lost
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


class TorchBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 80), nn.ReLU(), nn.Linear(80, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.layer_norm_2(x))


class TorchViT(nn.Module):
    """A ViT around torch.nn.MultiheadAttention, named as such models on the web are."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embedding = nn.ModuleDict({"patch_embed": nn.Conv2d(3, width, 8, 8)})
        self.transformer_layers = nn.Sequential(*(TorchBlock(width) for _ in range(2)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding["patch_embed"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.mlp_head(self.transformer_layers(tokens)[:, 0])


def test_torchs_attention(tmp_path, photographs):
    model = redrawn(TorchViT())
    torch.save(state(model), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="do not tell num_heads, mean, std"):
        open_weights(tmp_path / "a.pt", {"mlp": "relu"})
    imported = open_weights(tmp_path / "a.pt", {"mlp": "relu", "num_heads": 4, "mean": 0.5, "std": 0.5})
    assert imported.header.architecture.layer_norm_eps == 1e-5
    assert_same_logits(imported, model, HALF, photographs)


@pytest.mark.parametrize("name", ["TORCH_ATTENTION", "DINOV2", "DEIT3"])
def test_other_tables_in_both_directions_are_bit_equal(name):
    rules = getattr(naming, name)
    registers = {"num_registers": 2} if name == "DINOV2" else {}
    scale = {} if name == "TORCH_ATTENTION" else {"layer_scale": 0.1}
    config = ViTConfig(32, 8, embed_dim=48, num_heads=3, depth=2, num_classes=5, **registers, **scale)
    before = state(redrawn(ViT(config)))
    theirs, lost = to_theirs(before, rules, config)
    after, unknown = to_ours(theirs, rules, config)
    assert not unknown + lost
    assert theirs.keys() != before.keys()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["vit.embeddings.cls_token", "vit.encoder.layer.0.x"],
            "transformers model, whose config.json.*give its folder",
        ),
        (["embeddings.patch_embeddings.weight"], "give its folder"),
        (["visual.class_embedding", "visual.conv1.weight"], "are those of CLIP, which normalises tokens"),
        (["blocks.0.attn.q_bias", "blocks.0.attn.qkv.weight"], "BEiT or EVA.*timm:NAME=FILE"),
        (["conv1.weight", "layer1.0.bn1.weight"], "follow no naming scheme known here: torchvision's.*Google's .npz"),
    ],
)
def test_names_of_no_known_scheme(tmp_path, names, expected):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=expected):
        open_weights(tmp_path / "a.safetensors")


def test_a_description_that_cannot_be(tmp_path):
    torch.save({"model": state(VisionTransformer(**SHAPE))}, tmp_path / "a.pth")
    for description, expected in [
        ({}, "do not tell num_heads; .*--to vitrail --describe num_heads=N"),
        ({"num_heads": 5}, "num_heads 5 does not divide"),
        ({"num_heads": 3, "embed_dim": 64}, r"contradict what was described: embed_dim 64 \(its weights have 48\)"),
        ({"num_heads": 3, "nmu_heads": 3}, "unknown --describe key 'nmu_heads'; did you mean 'num_heads'"),
        ({"num_heads": 3, "labels": ["a"]}, "1 labels were described, but its head has 5 classes"),
        ({"num_heads": 3, "decoder": "mean"}, "missing: fc_norm"),
    ]:
        with pytest.raises(ValueError, match=expected):
            open_weights(tmp_path / "a.pth", description)


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_broken_files(tmp_path):
    torch.save({"model": state(VisionTransformer(**SHAPE)), "code": Bomb(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"objects or code besides tensors, which is never run.*safetensors"):
        open_weights(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": state(VisionTransformer(**SHAPE))}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:-5000])
    (tmp_path / "d.pth").write_text("not weights")
    for name in ("c.pth", "d.pth"):
        with pytest.raises(ValueError, match="not a whole file of PyTorch weights"):
            open_weights(tmp_path / name)
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "e.pth")
    with pytest.raises(ValueError, match="no state dict found in it, only epoch, loss"):
        open_weights(tmp_path / "e.pth")


def test_averaged_weights_come_before_the_last_ones(tmp_path):
    last, averaged = state(VisionTransformer(**SHAPE)), state(VisionTransformer(**SHAPE))
    torch.save({"model": last, "model_ema": averaged}, tmp_path / "a.pth")
    imported = open_weights(tmp_path / "a.pth", {"num_heads": 3})
    assert torch.equal(imported.weights["head.weight"], averaged["head.weight"])
    assert "weights are those of 'model_ema'; the file also holds model" in imported.report.notes
    notes = open_weights(tmp_path / "a.pth", {"num_heads": 3}).report.notes
    assert not any("left out" in note for note in notes)


@pytest.mark.parametrize("beside", [{"step": torch.tensor(3)}, {"teacher": {}, "step": torch.tensor(3)}])
def test_a_tensor_beside_a_container_does_not_hide_it(tmp_path, beside):
    tensors = state(VisionTransformer(**SHAPE))
    torch.save({**beside, "model": tensors}, tmp_path / "a.pth")
    imported = open_weights(tmp_path / "a.pth", {"num_heads": 3})
    assert torch.equal(imported.weights["head.weight"], tensors["head.weight"])
    assert "weights are those of 'model'; tensors beside it are left out: step" in imported.report.notes


def test_tensors_in_an_unknown_container_are_told(tmp_path):
    torch.save({**state(VisionTransformer(**SHAPE)), "ema": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    imported = open_weights(tmp_path / "a.pth", {"num_heads": 3, "mean": 0.5, "std": 0.5})
    assert "left out beside the weights: ema" in imported.report.notes


def test_a_container_in_itself_is_no_endless_search(tmp_path):
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no state dict found in it, only model"):
        open_weights(tmp_path / "a.pth")


def test_without_a_table_positions_must_be_described(tmp_path, photographs):
    model = redrawn(VisionTransformer(**SHAPE, pos_embed="none"))
    save_file(state(model), tmp_path / "a.safetensors")
    description = {
        "num_heads": 3,
        "mean": 0.5,
        "std": 0.5,
        "resize": "squash",
        "interpolation": "bilinear",
        "image_size": 32,
    }
    with pytest.raises(ValueError, match=r"do not tell positions \(there is no table.*sincos2d or rope2d\); .*=KIND"):
        open_weights(tmp_path / "a.safetensors", description)
    assert_same_logits(
        open_weights(tmp_path / "a.safetensors", {**description, "positions": "none"}), model, HALF, photographs
    )
    save_file(state(SimpleViT(**LUCID, heads=2)), tmp_path / "b.safetensors")
    notes = open_weights(tmp_path / "b.safetensors", {"mean": 0.5, "std": 0.5, "image_size": 32}).report.notes
    assert "positions sincos2d assumed, as the code of this naming scheme has it" in notes


def test_chunks_of_blocks_with_the_same_number_are_an_error(tmp_path):
    tensors = state(VisionTransformer(**SHAPE))
    tensors |= {f"blocks.7.{name[7:]}": tensor + 1 for name, tensor in tensors.items() if name.startswith("blocks.")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ and blocks\.7\.0\.\S+ are both blocks\.0\.\S+; which of"):
        open_weights(tmp_path / "a.safetensors", {"num_heads": 3, "mean": 0.5, "std": 0.5})


@pytest.mark.parametrize("number", [3, 999_999_999])
def test_blocks_must_count_from_0(tmp_path, number):
    tensors = {**state(VisionTransformer(**SHAPE)), f"blocks.{number}.norm1.weight": torch.ones(48)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"has a block {number}, but no block 2; its blocks must count from 0"):
        open_weights(tmp_path / "a.safetensors", {"num_heads": 3, "mean": 0.5, "std": 0.5})


@pytest.mark.slow
def test_many_names_that_do_not_fit_are_a_short_error(tmp_path):
    extra = {f"blocks.{i}.norm1.weight": torch.ones(48) for i in range(3000)}
    save_file({**extra, **state(VisionTransformer(**SHAPE))}, tmp_path / "a.safetensors")
    description = {"num_heads": 3, "mean": 0.5, "std": 0.5}
    with pytest.raises(ValueError, match=r"missing: blocks\.10\..* and \d+ more") as caught:
        open_weights(tmp_path / "a.safetensors", description)
    assert len(str(caught.value)) < 2000


def test_an_array_larger_than_any_memory_is_one_error(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("embedding/kernel.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"not a whole \.npz file"):
        open_weights(tmp_path / "a.npz")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_changed_or_cut_pickle_is_always_a_short_error(tmp_path, zipped):
    tensors = {"vit.layernorm.weight": torch.ones(24), "vit.layernorm.bias": torch.ones(24)}
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    whole, random, messages = (tmp_path / "a.bin").read_bytes(), np.random.default_rng(0), []
    for number in range(100):
        changed = bytearray(whole)
        for position in random.integers(0, len(whole), 5):
            changed[position] = random.integers(256)
        (tmp_path / "b.bin").write_bytes(bytes(changed) if number % 2 else whole[: random.integers(len(whole))])
        try:
            load_pickle(tmp_path / "b.bin")  # changed values of tensors are no error
        except ValueError as error:
            messages.append(str(error).replace(str(tmp_path), ""))
    assert len(messages) > 50
    assert max(map(len, messages)) < 400
