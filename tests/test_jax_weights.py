"""The `.npz` files of vision_transformer and big_vision give the model that timm reads from the same file."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from jax_files import stacked, to_jax
from photographs import as_numpy, assert_same_logits, redrawn, write_photographs
from timm.models import VisionTransformer
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights.formats.jax_tables import BIG_VISION, VISION_TRANSFORMER
from vitrail.weights.key_mapping import to_ours, to_theirs
from vitrail.weights.model_file import save_model
from vitrail.weights.resolve import open_weights

SHAPE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SIZE = {"image_size": 32, "patch_size": 8}
TIMM_SIZE = {"img_size": 32, "patch_size": 8}
SQUASH = Compose([Resize((32, 32)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
CROP = Compose([Resize(37, InterpolationMode.BILINEAR), CenterCrop(32), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])

# Our architecture, timm's arguments, whether big_vision wrote it, and the preprocessing of its evaluation.
KINDS = {
    "original": ({}, {}, False, SQUASH),
    "token": ({}, {"no_embed_class": True}, True, CROP),
    "gap": (
        {"decoder": "mean", "fc_norm": False, "class_token": False},
        {"global_pool": "avg", "fc_norm": False, "class_token": False},
        True,
        CROP,
    ),
    "map": ({"decoder": "attention", "class_token": False}, {"global_pool": "map", "class_token": False}, True, CROP),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"))


def npz(path: Path, tensors: dict, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: values for name, values in as_numpy(tensors).items()})
    return path


def random_file(path: Path, kind: str, prefix: str = "", rearranged=dict) -> Path:
    """Write a random model of ours as one of the two repositories would, and return the path."""
    ours, _, big_vision, _ = KINDS[kind]
    config = ViTConfig(**SIZE, **SHAPE, **ours)
    weights = {name: tensor.detach() for name, tensor in redrawn(ViT(config)).state_dict().items()}
    return npz(path, rearranged(to_jax(weights, config, big_vision=big_vision)), prefix)


@pytest.mark.parametrize(
    ("kind", "prefix", "rearranged"),
    [
        ("original", "", dict),
        ("original", "opt/target/", dict),
        ("token", "params/", dict),
        ("gap", "params/", dict),
        ("gap", "params/", stacked),
        ("map", "params/", dict),
        ("map", "opt/target/", stacked),
    ],
)
def test_timm_reads_the_same_model_from_the_file(tmp_path, photographs, kind, prefix, rearranged):
    file = random_file(tmp_path / "a.npz", kind, prefix, rearranged)
    peer = VisionTransformer(**TIMM_SIZE, **SHAPE, **KINDS[kind][1])
    peer.load_pretrained(str(file))
    imported = open_weights(file)
    assert_same_logits(imported, peer, KINDS[kind][3], photographs)
    assert any("as timm and transformers read such files" in note for note in imported.report.notes)
    assert not imported.report.unexpected + imported.report.resized


def test_stacked_blocks_become_a_model_file(tmp_path):
    imported = open_weights(random_file(tmp_path / "a.npz", "gap", "params/", stacked))
    save_model(tmp_path / "model.safetensors", imported.weights, imported.header)
    again = open_weights(tmp_path / "model.safetensors")
    assert again.header == imported.header
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in imported.weights.items())


def test_of_two_towers_the_image_model_is_read(tmp_path, photographs):
    file = random_file(tmp_path / "a.npz", "map", "params/img/")
    with np.load(file) as content:
        np.savez(
            file, **content, **{"params/txt/Embed_0/embedding": np.zeros((3, 4), "float32"), "params/t": np.ones(1)}
        )
    peer = VisionTransformer(**TIMM_SIZE, **SHAPE, **KINDS["map"][1])
    peer.load_pretrained(str(file))
    imported = open_weights(file)
    assert imported.report.unexpected == ("params/txt/Embed_0/embedding", "params/t")
    assert_same_logits(imported, peer, SQUASH, photographs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patch"), [("vit_base_r50_s16_224", 16), ("vit_large_r50_s32_224", 32)])
def test_hybrids_with_a_resnet(tmp_path, photographs, name, patch):
    model = redrawn(timm.create_model(name, img_size=64, **SHAPE))
    config = ViTConfig(image_size=64, patch_size=patch, encoder="r50", **SHAPE)
    weights = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    file = npz(tmp_path / "a.npz", to_jax(weights, config, big_vision=False))
    peer = timm.create_model(name, img_size=64, **SHAPE)
    peer.load_pretrained(str(file))
    transform = Compose([Resize((64, 64)), ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])
    assert_same_logits(open_weights(file), peer, transform, photographs)


@pytest.mark.parametrize(
    ("rules", "kind"), [(VISION_TRANSFORMER, "original"), (BIG_VISION, "map"), (BIG_VISION, "gap")]
)
def test_tables_in_both_directions_are_bit_equal(tmp_path, rules, kind):
    config = ViTConfig(**SIZE, **SHAPE, **KINDS[kind][0])
    with np.load(random_file(tmp_path / "a.npz", kind)) as file:
        before = {name: torch.from_numpy(file[name]) for name in file.files}
    ours, unknown = to_ours(before, rules, config)
    after, lost = to_theirs(ours, rules, config)
    assert not unknown + lost
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_computed_positions_equal_those_of_big_vision(tmp_path, photographs):
    file = random_file(tmp_path / "a.npz", "gap", "params/")
    with np.load(file) as content:
        rest = {name: content[name] for name in content.files if "pos_embedding" not in name}
    np.savez(file, **rest)
    with pytest.raises(ValueError, match=r"positions are computed.*--describe image_size=224"):
        open_weights(file)
    # posemb_sincos_2d of big_vision/models/vit.py.
    y, x = np.mgrid[:4, :4]
    omega = 1 / 10_000 ** (np.arange(12) / 11)
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype("float32")
    np.savez(tmp_path / "b.npz", **rest, **{"params/pos_embedding": table})
    peer = VisionTransformer(**TIMM_SIZE, **SHAPE, **KINDS["gap"][1])
    peer.load_pretrained(str(tmp_path / "b.npz"))
    assert_same_logits(open_weights(file, {"image_size": 32}), peer, CROP, photographs)


def test_a_user_spec_replaces_assumptions(tmp_path, photographs):
    file = random_file(tmp_path / "a.npz", "original")
    peer = VisionTransformer(**TIMM_SIZE, **SHAPE, act_layer="gelu_tanh")
    peer.load_pretrained(str(file))
    user_spec = {"mlp": "gelu_tanh", "resize": "crop", "crop_fraction": 32 / 37.5, "labels": tuple("abcde")}
    imported = open_weights(file, user_spec)
    assert imported.header.labels == tuple("abcde")
    assert not any("gelu" in note or "labels" in note for note in imported.report.notes)
    assert_same_logits(imported, peer, CROP, photographs)
    with pytest.raises(ValueError, match=r"contradict what was described: num_heads 4 \(its weights have 3\)"):
        open_weights(file, {"num_heads": 4})
    with pytest.raises(ValueError, match="2 labels were described, but its head has 5 classes"):
        open_weights(file, {"labels": ("a", "b")})


def test_another_size_and_patch(tmp_path):
    imported = open_weights(random_file(tmp_path / "a.npz", "token", "params/"), {"image_size": 60, "patch_size": 12})
    assert imported.report.resized == (
        "pos_embed: 4×4 → 5×5 patches",
        "patch_embed.proj.weight: patches of 8 → 12 px",
    )
    assert imported.header.preprocess.image_size == 60


def test_bfloat16_of_jax(tmp_path):
    file = random_file(tmp_path / "a.npz", "original")
    with np.load(file) as content:
        halves = {name: torch.from_numpy(content[name]).bfloat16() for name in content.files}
    np.savez(tmp_path / "b.npz", **{name: half.view(torch.int16).numpy().view("V2") for name, half in halves.items()})
    weights = open_weights(tmp_path / "b.npz").weights
    assert torch.equal(weights["norm.weight"], halves["Transformer/encoder_norm/scale"].float())


def test_a_tanh_layer_goes_only_without_a_head(tmp_path):
    file = random_file(tmp_path / "a.npz", "original")
    with np.load(file) as content:
        arrays = dict(content) | {"pre_logits/kernel": np.eye(48, dtype="float32"), "pre_logits/bias": np.zeros(48)}
    np.savez(file, **arrays)
    with pytest.raises(ValueError, match="its head reads a tanh layer"):
        open_weights(file)
    np.savez(file, **{name: array for name, array in arrays.items() if not name.startswith("head/")})
    imported = open_weights(file)
    assert imported.header.architecture.num_classes == 0
    assert set(imported.report.unexpected) == {"pre_logits/kernel", "pre_logits/bias"}


def test_broken_and_foreign_files(tmp_path):
    file = random_file(tmp_path / "a.npz", "original")
    with np.load(file) as content:
        arrays = dict(content)
    del arrays["Transformer/encoderblock_1/LayerNorm_0/scale"]
    np.savez(tmp_path / "less.npz", **arrays, **{"Transformer/extra/scale": np.zeros(3, "float32")})
    with pytest.raises(ValueError, match=r"(?s)missing: blocks\.1\.norm1\.weight.*unexpected: Transformer/extra/scale"):
        open_weights(tmp_path / "less.npz")
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"not a whole \.npz file"):
        open_weights(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", **{"stem/kernel": np.zeros(3)})
    with pytest.raises(ValueError, match=r"embedding/kernel is not among its 1 arrays"):
        open_weights(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"not a whole \.npz file of plain arrays"):
        open_weights(tmp_path / "objects.npz")
