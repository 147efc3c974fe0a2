"""The architecture of a `config.json` of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitrail.lookup import pick
from vitrail.models.config import ViTConfig
from vitrail.weights.finalise import mlp_ratio
from vitrail.weights.formats.hf_tables import ACTIVATIONS

_SIDE_LIMIT = 8192  # pixels; beyond, a table of positions would fill the memory before anything else fails


def hf_architecture(model_type: str, settings: Mapping[str, Any], num_classes: int, *, pair: bool) -> ViTConfig:
    """Return the architecture that a config.json describes.

    Args:
        pair: whether the model is a distilled DeiT with both its heads.

    Raises:
        ValueError: a value is impossible, or means something that `ViT` does not do.
    """
    dim, heads = _whole(settings, "hidden_size"), _whole(settings, "num_attention_heads")
    fields: dict[str, Any] = {}
    if model_type == "dinov3_vit":
        _check_rope(settings)
        biases = [_flag(settings, f"{name}_bias") for name in ("query", "key", "value")]
        fields |= {"positions": "rope2d", "qkv_bias": any(biases)}
    else:
        fields["qkv_bias"] = _flag(settings, "qkv_bias")
    if model_type.startswith("dino"):
        scale = _number(settings, "layerscale_value")
        fields["layer_scale"] = scale if scale > 0 else 1.0  # initial; the weights bring their own
    if "num_register_tokens" in settings:
        fields["num_registers"] = _whole(settings, "num_register_tokens", least=0)
    elif model_type == "deit":
        fields["num_registers"] = 1
    gated = "use_gated_mlp" if model_type == "dinov3_vit" else "use_swiglu_ffn"
    swiglu = gated in settings and _flag(settings, gated)
    hidden = _hidden_width(settings, dim, swiglu)
    mean = model_type.startswith("dinov2") and num_classes
    width = _whole(settings, "head_dim") if "head_dim" in settings and model_type != "dinov3_vit" else 0
    return ViTConfig(
        image_size=_square(settings, "image_size"),
        patch_size=_square(settings, "patch_size"),
        in_channels=_whole(settings, "num_channels"),
        num_classes=num_classes,
        embed_dim=dim,
        depth=_whole(settings, "num_hidden_layers"),
        num_heads=heads,
        head_dim=0 if width * heads == dim else width,
        mlp=_activation(settings, swiglu, model_type),
        mlp_ratio=mlp_ratio(hidden, dim),
        decoder="token_pair" if pair else "token_mean" if mean else "token",
        layer_norm_eps=_number(settings, "layer_norm_eps"),
        **fields,
    )


def swiglu_width(dim: int, mlp_ratio: int) -> int:
    """Return the hidden width of DINOv2's gated MLP: two thirds, rounded up to a multiple of 8."""
    return (int(int(dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def _whole(settings: Mapping[str, Any], key: str, least: int = 1) -> int:
    value = settings[key]
    if type(value) is not int or not least <= value < 2**24:
        raise ValueError(f"{key} in config.json is {value!r}; expected a whole number from {least}")
    return value


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} in config.json is {value!r}; expected a number")
    return float(value)


def _flag(settings: Mapping[str, Any], key: str) -> bool:
    if not isinstance(settings[key], bool):
        raise ValueError(f"{key} in config.json is {settings[key]!r}; expected true or false")
    return settings[key]


def _square(settings: Mapping[str, Any], key: str) -> int:
    value = settings[key]
    sides = value if isinstance(value, list) and len(value) == 2 else [value, value]
    side = _whole({key: sides[0]}, key)
    if sides[0] != sides[1]:
        raise ValueError(f"{key} in config.json is {value}; only squares can be read, as this model has one {key}")
    if side > _SIDE_LIMIT:
        raise ValueError(f"{key} in config.json is {side}; expected at most {_SIDE_LIMIT} pixels")
    return side


def _hidden_width(settings: Mapping[str, Any], dim: int, swiglu: bool) -> int:
    if "intermediate_size" in settings and "mlp_ratio" not in settings:
        return _whole(settings, "intermediate_size")
    ratio = _number(settings, "mlp_ratio")
    if not 0 < ratio < 1024:
        raise ValueError(f"mlp_ratio in config.json is {ratio}; expected a number above 0")
    width = int(dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if swiglu else width


def _activation(settings: Mapping[str, Any], swiglu: bool, model_type: str) -> str:
    name = settings["hidden_act"]
    if not swiglu:
        return pick(ACTIVATIONS, str(name), "hidden_act in config.json:")
    if model_type == "dinov3_vit" and name not in ("silu", "swish"):
        raise ValueError(f"hidden_act in config.json is {name!r}; a gated MLP is computed with silu only")
    return "swiglu"


def absent_biases(settings: Mapping[str, Any]) -> frozenset[str]:
    """Return the biases that a configuration switches off one by one, of `query key value proj mlp`."""
    names = ("query", "key", "value", "proj", "mlp")
    absent = frozenset(name for name in names if f"{name}_bias" in settings and not _flag(settings, f"{name}_bias"))
    return absent - {"query", "key", "value"} if {"query", "key", "value"} <= absent else absent


def _check_rope(settings: Mapping[str, Any]) -> None:
    """Raise an error where rotary positions differ from `rope2d`."""
    if _number(settings, "rope_theta") != 100.0:
        raise ValueError(f"rope_theta in config.json is {settings['rope_theta']}; rotary positions here have 100")
    for key in ("rope_scaling", "rope_parameters"):
        if settings.get(key):
            raise ValueError(f"{key} in config.json is {settings[key]!r}; rotary positions are not scaled here")
