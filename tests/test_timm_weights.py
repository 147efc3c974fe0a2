"""timm's models come in with the logits that timm gives, from the image file on, and go out again."""

import dataclasses
import json
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import timm.models._hub
import torch
from photographs import assert_same_logits, redrawn, write_photographs
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers.mlp import GluMlp
from torch import nn

from vitrail.cli import run
from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights import naming
from vitrail.weights.formats.timm_modules import read_architecture
from vitrail.weights.formats.timm_writer import write_timm
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.key_mapping import to_ours, to_theirs
from vitrail.weights.model_file import ModelHeader
from vitrail.weights.resolve import open_weights

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SIZE_32 = {"img_size": 32, "patch_size": 8}

# architecture, model_args, changes of pretrained_cfg
FAMILIES = {
    "token": ("vit_tiny_patch16_224", {**SIZE_32}, {}),
    "gap": ("vit_base_patch16_gap_224", SIZE_32, {"crop_pct": 1.0, "interpolation": "bilinear"}),
    "siglip": ("vit_base_patch16_siglip_224", SIZE_32, {"crop_mode": "squash", "crop_pct": 1.0}),
    "squash-crop": ("vit_tiny_patch16_224", SIZE_32, {"crop_mode": "squash", "crop_pct": 0.8}),
    "siglip2": ("vit_so400m_patch16_siglip_256", {**SIZE_32, "act_layer": "gelu_tanh"}, {"crop_pct": 0.77}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 28, "patch_size": 7}, {"crop_pct": 0.875}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "patch_size": 7}, {}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"img_size": 28, "patch_size": 7}, {}),
    "token-fc-norm": ("vit_tiny_patch16_224", {**SIZE_32, "fc_norm": True}, {}),
    "mean-no-fc-norm": ("vit_tiny_patch16_224", {**SIZE_32, "global_pool": "avg", "fc_norm": False}, {}),
    "qk-norm": ("vit_tiny_patch16_224", {**SIZE_32, "qk_norm": True, "act_layer": "quick_gelu"}, {}),
    "grey": ("vit_tiny_patch16_224", {**SIZE_32, "in_chans": 1}, {"mean": [0.4], "std": [0.3]}),
    "eva": ("eva_giant_patch14_224", {**SIZE_32, "global_pool": "avg"}, {}),
    "deit": ("deit_tiny_patch16_224", SIZE_32, {}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", SIZE_32, {}),
    "deit3": ("deit3_small_patch16_224", SIZE_32, {"interpolation": "lanczos"}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "patch_size": 16}, {}),
    "dinov3-biases": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64, "global_pool": "token"}, {}),
    "dinov3-plus": ("vit_small_plus_patch16_dinov3", {"img_size": 64}, {}),
    "r50": ("vit_base_r50_s16_224", {"img_size": 64}, {}),
    "resnet26d": ("vit_small_resnet26d_224", {"img_size": 64}, {}),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"))


def save(folder: Path, architecture: str, args: dict, changes: dict, *, kind: str = "safetensors", **top):
    """Write a folder as timm does; returns the model."""
    model = redrawn(timm.create_model(architecture, **TINY, **args))
    size = args.get("img_size", 224)
    data = {"input_size": [args.get("in_chans", 3), size, size], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    timm.models._hub.save_for_hf(
        model, str(folder), model_config=top or None, data_config=data, safe_serialization=kind == "safetensors"
    )
    return model


def transform_of(folder: Path):
    """Return timm's own evaluation transform of a folder's model."""
    cfg = timm.create_model(f"local-dir:{folder}").pretrained_cfg
    return create_transform(**resolve_data_config(pretrained_cfg=cfg))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_in_timm(tmp_path, photographs, family):
    architecture, args, changes = FAMILIES[family]
    model = save(tmp_path, architecture, args, changes)
    imported = open_weights(tmp_path)
    transform = transform_of(tmp_path)
    if family == "grey":
        coloured = transform
        transform = lambda image: coloured(image.convert("L"))  # noqa: E731
    assert_same_logits(imported, model, transform, photographs)
    assert imported.report.loaded == len(imported.weights)
    assert not imported.report.missing + imported.report.unexpected + imported.report.resized


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("r50", "resnet26d")])
def test_tables_in_both_directions_are_bit_equal(family):
    architecture, args, _ = FAMILIES[family]
    model = redrawn(timm.create_model(architecture, **TINY, **args))
    found = read_architecture(model, "test")
    theirs = naming.join_heads({name: tensor.detach() for name, tensor in model.state_dict().items()})
    ours, unknown = to_ours(theirs, found.rules, found.config)
    back, lost = to_theirs(ours, found.rules, found.config)
    assert not unknown + lost
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "resnet26d"])
def test_every_family_goes_out_as_it_came(tmp_path, photographs, family):
    architecture, args, changes = FAMILIES[family]
    save(tmp_path / "in", architecture, args, changes, label_names=["ant", "bee", "cat", "dog", "elk"])
    imported = open_weights(tmp_path / "in")
    assert write_timm(imported.header, imported.weights, tmp_path / "out") == []
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert again.pretrained_cfg["label_names"] == ["ant", "bee", "cat", "dog", "elk"]
    transform = transform_of(tmp_path / "out")
    if family == "grey":
        coloured = transform
        transform = lambda image: coloured(image.convert("L"))  # noqa: E731
    assert_same_logits(imported, again, transform, photographs)
    back = open_weights(tmp_path / "out")
    assert back.header.preprocess == imported.header.preprocess
    assert back.header.labels == imported.header.labels


@pytest.mark.parametrize(
    "change",
    [
        {"positions": "sincos2d"},
        {"positions": "none", "mlp": "relu"},
        {"decoder": "token_pair", "num_registers": 1},
        {"layer_norm_eps": 1e-5, "decoder": "attention", "mlp": "gelu_tanh", "layer_scale": 0.1},
        {"mlp": "swiglu", "mlp_ratio": 8 / 3, "class_token": False, "decoder": "mean"},
        {"positions": "rope2d", "layer_norm_eps": 1e-5, "qkv_bias": False, "num_registers": 2},
        {"encoder": "r50", "patch_size": 32, "image_size": 64, "decoder": "mean", "fc_norm": False},
    ],
    ids=str,
)
def test_our_own_models_go_out(tmp_path, photographs, change):
    config = ViTConfig(
        **{"image_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 4, **change}
    )
    model = redrawn(ViT(config))
    header = ModelHeader(config, ("a", "b", "c", "d"), Preprocess(image_size=config.image_size, crop_fraction=0.8))
    imported = ImportedModel(header, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    write_timm(header, imported.weights, tmp_path)
    peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same_logits(imported, peer, transform_of(tmp_path), photographs)


def test_what_timm_does_not_have_is_not_written(tmp_path):
    config = ViTConfig(32, 8, embed_dim=48, num_heads=3, depth=2, num_classes=2, attention="local", window=3)
    for change, expected in {
        "local": ({}, "no model.attention 'local'"),
        "concat": ({"attention": "global", "window": 0, "decoder": "concat"}, "no model.decoder 'concat'"),
        "epsilon": ({"attention": "global", "window": 0, "layer_norm_eps": 1e-12}, "no model.layer_norm_eps 1e-12"),
        "cnn": (
            {"attention": "global", "window": 0, "encoder": "resnet26d", "patch_size": 32},
            "no model.encoder 'resnet26d' at model.patch_size 32",
        ),
        "conv": ({"attention": "global", "window": 0, "encoder": "conv"}, "no model.encoder 'conv'"),
        "heads": ({"attention": "global", "window": 0, "head_dim": 20}, "no model.head_dim 20"),
    }.values():
        architecture = dataclasses.replace(config, **change)
        header = ModelHeader(architecture, ("a", "b"), Preprocess(image_size=32))
        with pytest.raises(ValueError, match=f"timm cannot express this model: it has {expected}"):
            write_timm(header, ViT(architecture).state_dict(), tmp_path / "out")
    plain = dataclasses.replace(config, attention="global", window=0)
    header = ModelHeader(plain, ("a", "b"), Preprocess(image_size=32, crop_offset="down", resampler="torchvision"))
    with pytest.raises(ValueError, match=r"no preprocess.resampler 'torchvision', no preprocess.crop_offset 'down'"):
        write_timm(header, ViT(plain).state_dict(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_folder_of_timms(tmp_path, photographs):
    model = save(tmp_path / "in", "vit_tiny_patch16_224", SIZE_32, {})
    assert run(["export", str(tmp_path / "in"), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    assert_same_logits(open_weights(tmp_path / "out"), model, transform_of(tmp_path / "in"), photographs)


def test_two_heads_from_one_answer_as_before():
    heads = {f"{head}.{part}": torch.randn(*shape) for head in ("head", "head_dist") for part, shape in PARTS.items()}
    split = naming.split_heads(naming.join_heads(heads))
    assert split.keys() == heads.keys()
    assert torch.equal(split["head_dist.weight"], heads["head_dist.weight"])
    both = heads["head.bias"] + heads["head_dist.bias"]
    torch.testing.assert_close(split["head.bias"] + split["head_dist.bias"], both)


PARTS = {"weight": (5, 8), "bias": (5,)}


def test_a_pickled_folder_and_the_labels_of_its_config(tmp_path, photographs):
    labels = ["ant", "bee", "cat", "dog", "elk"]
    model = save(tmp_path, "vit_tiny_patch16_224", SIZE_32, {}, kind="pickle", label_names=labels)
    assert (tmp_path / "pytorch_model.bin").exists()
    imported = open_weights(f"timm:{tmp_path}")
    assert imported.header.labels == tuple(labels)
    assert_same_logits(imported, model, transform_of(tmp_path), photographs)


def test_a_file_under_the_name_of_its_model(tmp_path, photographs):
    model = redrawn(timm.create_model("test_vit"))
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "a.pth")
    imported = open_weights(f"timm:test_vit.r160_in1k={tmp_path / 'a.pth'}")
    assert imported.header.labels[0] == "n01440764"
    assert any("assumed from 1000 classes" in note for note in imported.report.notes)
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    assert_same_logits(imported, model, transform, photographs)


def test_a_fine_tuned_file_has_classes_of_its_own(tmp_path, photographs):
    model = redrawn(timm.create_model("test_vit", num_classes=7))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    imported = open_weights(f"timm:test_vit={tmp_path / 'a.safetensors'}")
    assert imported.header.labels == tuple("0123456")
    assert "labels are numbers: timm names none" in imported.report.notes
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    assert_same_logits(imported, model, transform, photographs)


def test_a_repository_that_timm_wrote_comes_from_the_hubs_cache(tmp_path, photographs, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    labels = ["ant", "bee", "cat", "dog", "elk"]
    model = save(repository / "snapshots" / commit, "vit_tiny_patch16_224", SIZE_32, {}, label_names=labels)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    imported = open_weights(f"timm:hf-hub:someone/tiny@{commit}")
    assert imported.header.labels == tuple(labels)
    assert imported.report.origin == f"timm:hf-hub:someone/tiny@{commit}"
    assert_same_logits(imported, model, transform_of(repository / "snapshots" / commit), photographs)
    with pytest.raises(ValueError, match=f"is a model of timm.*load it as timm:hf-hub:someone/tiny@{commit}"):
        open_weights(f"hf:someone/tiny@{commit}")


def test_another_grid_and_patch_in_the_file_are_resized_as_timm_does(tmp_path, photographs):
    trained = redrawn(timm.create_model("test_vit", img_size=96, patch_size=8))
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    imported = open_weights(f"timm:test_vit={tmp_path / 'a.safetensors'}")
    assert imported.report.resized == (
        "pos_embed: 12×12 → 10×10 patches",
        "patch_embed.proj.weight: patches of 8 → 16 px",
    )
    overlay = {"state_dict": dict(trained.state_dict())}
    peer = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay)
    transform = create_transform(**resolve_data_config(pretrained_cfg=peer.pretrained_cfg))
    assert_same_logits(imported, peer, transform, photographs)


def test_published_weights_come_from_the_hubs_cache(tmp_path, photographs, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model = redrawn(timm.create_model("test_vit"))
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(model.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    imported = open_weights("timm:test_vit.r160_in1k")
    transform = create_transform(**resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    assert_same_logits(imported, model, transform, photographs)
    with pytest.raises(ValueError, match=r"could not be had.*need the network once.*timm:test_vit2=FILE"):
        open_weights("timm:test_vit2")


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(tmp_path):
    for number, content in enumerate([Bomb(tmp_path / "ran"), {"model": Bomb(tmp_path / "ran")}]):
        torch.save(content, tmp_path / f"{number}.pth")
        (tmp_path / f"old{number}.bin").write_bytes(pickle.dumps(content))
        for name in (f"{number}.pth", f"old{number}.bin"):
            with pytest.raises(ValueError, match="never run|not a whole file"):
                open_weights(f"timm:test_vit={tmp_path / name}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model_spec", "expected"),
    [
        ("timm:vit_bse_patch16_224", r"is no model of timm's; did you mean 'vit_base_patch16_224'"),
        ("timm:patch14_dinov2", r"did you mean 'vit_base_patch14_dinov2'"),
        ("timm:nosuch", r"is no model of timm's; expected such as 'vit_base_patch16_224'"),
        ("timm:vit_base_patch16_224.nowhere", r"no weights 'nowhere' of vit_base_patch16_224; it has .*augreg"),
        ("timm:swin_tiny_patch4_window7_224", r"SwinTransformer, which is not among"),
        ("timm:vit_base_patch16_clip_224.openai", r"cannot express it: .*before the first block"),
        ("timm:vit_so400m_patch14_siglip_384", r"384 px are no multiple of its patches of 14"),
        ("timm:eva02_tiny_patch14_224", r"cannot express it: .*(RotaryEmbedding|separate)"),
        ("timm:vit_tiny_r_s16_p8_224", r"cut into patches of 8"),
        ("timm:test_vit=nowhere.pth", r"nowhere\.pth: no such file"),
        ("timm:vit_small_resnet26d_224", r"timm publishes no weights of this name"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(model_spec, expected):
    with pytest.raises(ValueError, match=expected):
        open_weights(model_spec)


def test_files_that_do_not_fit_list_all_that_differs(tmp_path):
    state = dict(timm.create_model("test_vit").state_dict())
    del state["norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"(?s)missing: norm\.bias.*unexpected: extra\.weight.*head\.bias is \(7,\)"):
        open_weights(f"timm:test_vit={tmp_path / 'a.safetensors'}")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        open_weights(f"timm:test_vit={tmp_path / 'b.safetensors'}")


def test_a_config_that_does_not_fit_is_told(tmp_path):
    save(tmp_path, "vit_tiny_patch16_224", SIZE_32, {})
    config = json.loads((tmp_path / "config.json").read_text())
    for change, expected in {
        "architecture": (lambda c: c | {"architecture": "vit_nowhere"}, "is no model of timm's"),
        "size": (
            lambda c: (
                c | {"pretrained_cfg": c["pretrained_cfg"] | {"input_size": [3, 48, 48], "fixed_input_size": False}}
            ),
            "does not fit itself",
        ),
        "depth": (lambda c: c | {"model_args": c["model_args"] | {"depth": 3}}, r"missing: blocks\.2\.attn"),
        "argument": (lambda c: c | {"model_args": c["model_args"] | {"deepness": 3}}, "timm cannot build it"),
        "crop": (lambda c: c | {"pretrained_cfg": c["pretrained_cfg"] | {"crop_mode": "border"}}, "crop_mode 'border'"),
    }.values():
        (tmp_path / "config.json").write_text(json.dumps(change(config)))
        with pytest.raises(ValueError, match=expected):
            open_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        open_weights(tmp_path)


def test_a_gate_in_the_second_half_is_turned():
    model = redrawn(
        timm.create_model("vit_tiny_patch16_224", **TINY, **SIZE_32, mlp_layer=GluMlp, act_layer=nn.SiLU, mlp_ratio=3.0)
    )
    found = read_architecture(model, "test")
    ours = ViT(found.config).eval()
    ours.load_state_dict(to_ours(model.state_dict(), found.rules, ViTConfig())[0])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), model(images))
