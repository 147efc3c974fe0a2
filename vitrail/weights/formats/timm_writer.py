"""Write a model as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens, with our logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vitrail.data.images.preprocess import Preprocess
from vitrail.files import write_text
from vitrail.models.config import ViTConfig
from vitrail.models.positions import sincos2d
from vitrail.tensor_files import save_tensors
from vitrail.weights.finalise import mlp_ratio
from vitrail.weights.formats.timm_modules import read_architecture
from vitrail.weights.key_mapping import to_theirs
from vitrail.weights.model_file import ModelHeader
from vitrail.weights.naming import split_heads

# Names in timm's registry; each was chosen for what its arguments cannot change.
_PLAIN = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}  # by layer-norm epsilon
_SWIGLU = "vit_giant_patch14_dinov2"
_DISTILLED = "deit_base_distilled_patch16_224"
_ROPE = {"gelu": "vit_small_patch16_dinov3", "swiglu": "vit_small_plus_patch16_dinov3"}  # and the same with _qkvb
# timm would fetch the CNN of its other hybrids anew, from the network, before it reads the folder.
_HYBRIDS = {("r50", 16): "vit_base_r50_s16_224", ("r50", 32): "vit_large_r50_s32_224"}


def write_timm(header: ModelHeader, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write a model as timm's `config.json` and `model.safetensors`; return notes on what had to be left out.

    Raises:
        ValueError: timm cannot express the model; the message gives every reason, and nothing is written.
    """
    config = header.architecture
    refuse_inexpressible(header, weights)
    name, arguments = timm_arguments(config)
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=config.num_classes, **arguments)
    theirs, unknown = to_theirs(_with_timm_weights(weights, config), read_architecture(model, name).rules, config)
    theirs = split_heads(theirs) if config.decoder == "token_pair" else theirs
    shapes = {key: tensor.shape for key, tensor in theirs.items()}
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert not unknown, unknown
    assert shapes == wanted, set(shapes.items()) ^ set(wanted.items())
    content = {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        **({"label_names": list(header.labels)} if header.labels else {}),
        "pretrained_cfg": pretrained_cfg(header.preprocess, config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", theirs, {})
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    notes = [f"temperature {header.temperature:g} is left out: it changes probabilities, not the order"]
    patches = "other patch sizes of its training are left out: timm has one"
    return notes * (header.temperature != 1.0) + [patches] * bool(config.patch_sizes)


def refuse_inexpressible(header: ModelHeader, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names every feature of a model that timm does not have, if there are any."""
    config = header.architecture
    name = None if "local" in config.attention else _name(config)
    has_key_bias = any(
        bool(tensor.chunk(3)[1].any()) for key, tensor in weights.items() if key.endswith("attn.qkv.bias")
    )
    reasons = {
        f"model.attention {config.attention!r}": "local" in config.attention,
        f"model.decoder {config.decoder!r}": config.decoder in ("concat", "token_mean"),
        f"model.encoder {config.encoder!r} at model.patch_size {config.patch_size}": config.encoder != "patch"
        and (config.encoder, config.patch_size) not in _HYBRIDS,
        "model.patch_norm": config.patch_norm,
        f"model.head_dim {config.head_dim}": config.head_width * config.num_heads != config.embed_dim,
        f"model.layer_norm_eps {config.layer_norm_eps:g} with the rest": name is not None and config.layer_norm_eps != _epsilon(name),
        f"model.mlp {config.mlp!r} with the rest": not _takes_mlp(config),
        "an attention decoder with model.mlp 'swiglu'": config.decoder == "attention" and config.mlp == "swiglu",
        "model.positions 'rope2d' with a bias of the keys": config.positions == "rope2d" and has_key_bias,
        f"model.decoder 'token_pair' with {config.num_registers} registers or positions {config.positions!r}": config.decoder
        == "token_pair"
        and (config.num_registers != 1 or config.positions not in ("learned", "sincos2d")),
        "preprocess.resize 'aspect'": header.preprocess.resize == "aspect",
        f"preprocess.resampler {header.preprocess.resampler!r}": header.preprocess.resampler != "pillow",
        "preprocess.crop_offset 'down'": header.preprocess.crop_offset == "down" and "crop" in header.preprocess.resize,
    }  # fmt: skip
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"timm cannot express this model: it has no {', no '.join(wrong)}")


def timm_arguments(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """Return the name in timm's registry, and the arguments that make it this architecture."""
    name = _name(config)
    pool = {"mean": "avg", "attention": "map"}.get(config.decoder, "token")
    is_rope, width = config.positions == "rope2d", 2 if name == _SWIGLU else 1
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "in_chans": config.in_channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": mlp_ratio(width * config.hidden_dim, config.embed_dim),
        "qk_norm": config.qk_norm,
        "class_token": config.class_token,
        "global_pool": pool,
        "use_fc_norm" if is_rope else "fc_norm": config.decoder == "mean" and config.fc_norm,
    }
    if config.encoder == "patch":
        arguments["patch_size"] = config.patch_size
    if config.layer_scale:
        arguments["init_values"] = config.layer_scale
    if is_rope:
        return name, arguments | {"num_reg_tokens": config.num_registers}
    arguments |= {"qkv_bias": config.qkv_bias}
    if config.decoder != "token_pair":
        arguments["reg_tokens"] = config.num_registers
    if config.positions == "none":
        arguments["pos_embed"] = "none"
    if config.mlp not in ("gelu", "swiglu"):
        arguments["act_layer"] = config.mlp
    if name == _PLAIN[1e-5]:
        arguments["pre_norm"] = False
    return name, arguments


def pretrained_cfg(preprocess: Preprocess, config: ViTConfig) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`: the preprocessing, the number of classes, and the names of first and last layer."""
    return {
        "input_size": [preprocess.channels, preprocess.image_size, preprocess.image_size],
        "fixed_input_size": preprocess.image_size == config.image_size,
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_fraction if "crop" in preprocess.resize else 1.0,
        "crop_mode": "center" if preprocess.resize == "crop" else "squash",
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": config.num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.decoder == "token_pair" else "head",
    }


def _name(config: ViTConfig) -> str:
    if config.positions == "rope2d":
        return _ROPE.get(config.mlp, _ROPE["gelu"]) + ("_qkvb" if config.qkv_bias else "")
    if config.decoder == "token_pair":
        return _DISTILLED
    if config.encoder != "patch":
        return _HYBRIDS.get((config.encoder, config.patch_size), _PLAIN[1e-6])
    return _SWIGLU if config.mlp == "swiglu" else _PLAIN.get(config.layer_norm_eps, _PLAIN[1e-6])


def _epsilon(name: str) -> float:
    return 1e-5 if "dinov3" in name or name == _PLAIN[1e-5] else 1e-6


def _takes_mlp(config: ViTConfig) -> bool:
    """Whether the registry's model can have this MLP; timm's SwiGLU is a class, which no JSON file can name."""
    name = _name(config)
    if "dinov3" in name:
        # The gated form rounds its width up to a multiple of 8.
        return config.mlp in _ROPE and (config.mlp == "gelu" or config.hidden_dim % 8 == 0)
    return config.mlp != "swiglu" or name == _SWIGLU


def _with_timm_weights(weights: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Return weights with those that only timm's model has: LayerScale of ones, a table for computed positions."""
    out = dict(weights)
    if not config.layer_scale and ("dinov3" in _name(config) or _name(config) == _SWIGLU):
        out |= {
            f"blocks.{i}.ls{branch}.gamma": torch.ones(config.embed_dim)
            for i in range(config.depth)
            for branch in (1, 2)
        }
    if config.positions == "sincos2d":
        table = sincos2d(config.grid, config.embed_dim)
        out["pos_embed"] = torch.nn.functional.pad(table, (0, 0, config.num_prefix, 0))
    return out
