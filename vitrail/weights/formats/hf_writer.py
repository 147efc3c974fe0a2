"""Write a model as a folder that transformers' `from_pretrained` opens. transformers itself is not needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.lookup import shorten
from vitrail.models.config import ViTConfig
from vitrail.models.positions import sincos2d
from vitrail.tensor_files import save_tensors
from vitrail.weights.formats.hf_config import swiglu_width
from vitrail.weights.formats.hf_image_processor import to_processor
from vitrail.weights.formats.hf_tables import ACTIVATIONS, FAMILIES, Family
from vitrail.weights.key_mapping import to_theirs
from vitrail.weights.model_file import ModelHeader

# Our activation → the name that transformers prefers among several.
_ACTIVATIONS = {
    ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs not in ("gelu_python", "gelu_new", "gelu_fast")
}


class HfModel(NamedTuple):
    """A model rewritten for one of transformers' families: the same function, perhaps with other weights.

    Attributes:
        model_type: name in `FAMILIES`.
        config: the architecture, one that the family has.
        weights: its weights, under our names.
        notes: what was rewritten, one line each.
    """

    model_type: str
    config: ViTConfig
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def write_hf(header: ModelHeader, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json`; return notes for the user.

    Raises:
        ValueError: transformers has no model or image processor that does the same; the message says why.
    """
    made = as_hf_model(header.architecture, weights)
    processor, image_notes = to_processor(header.preprocess)
    family = FAMILIES[made.model_type]
    tensors = _tensors(made, family)
    dtype = str(next(iter(tensors.values())).dtype)
    settings: dict[str, Any] = {
        "architectures": [family.classes[made.config.decoder] if made.config.num_classes else family.base],
        "model_type": made.model_type,
        **_settings(made),
        "dtype": dtype.removeprefix("torch."),
        "vitrail": {"temperature": header.temperature},
    }
    if made.config.num_classes:
        settings["id2label"] = {str(i): label for i, label in enumerate(header.labels)}
        settings["label2id"] = {label: i for i, label in enumerate(header.labels)}
    if made.config.decoder == "token_pair":
        _split_pair(tensors, made.config.embed_dim)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    save_tensors(folder / "model.safetensors", tensors, {})
    notes = [f"written as {settings['architectures'][0]} ({made.model_type})", *made.notes, *image_notes]
    twice = sorted({label for label in header.labels if header.labels.count(label) > 1})
    if twice:
        notes.append(
            f"labels that stand for several classes: {shorten(twice)}; label2id in config.json has the last class of each"
        )
    if header.temperature != 1.0:
        notes.append(
            f"the temperature {header.temperature:.4g} stands in config.json, but transformers does not apply it: divide the "
            "logits by it before the softmax"
        )
    return notes


def as_hf_model(config: ViTConfig, weights: Mapping[str, Tensor]) -> HfModel:
    """Return a model rewritten for the family of transformers that can express it.

    Raises:
        ValueError: no family can; the message gives every reason.
    """
    model_type = _family_of(config)
    reasons = [*_reasons(config), *(_mlp_reasons(config) if model_type.startswith("dinov2") else ())]
    if reasons:
        raise ValueError(
            f"transformers cannot express this model: {'; '.join(reasons)}. What it can: --model.encoder patch "
            "--model.attention global --model.decoder token. With timm installed it also opens what --to timm writes"
        )
    made = HfModel(model_type, config, dict(weights))
    if model_type.startswith("dino") and not config.layer_scale:
        ones = {f"blocks.{i}.ls{n}.gamma": torch.ones(config.embed_dim) for i in range(config.depth) for n in (1, 2)}
        made = _changed(made, ones, "LayerScale is written as ones", layer_scale=1.0)
    if config.positions in ("sincos2d", "none"):
        table = torch.zeros(1, config.num_prefix + config.grid[0] * config.grid[1], config.embed_dim)
        if config.positions == "sincos2d":
            table[:, config.num_prefix :] = sincos2d(config.grid, config.embed_dim)
        what = f"positions {config.positions!r} are written as a table"
        made = _changed(made, {"pos_embed": table}, what, positions="learned")
    if model_type == "dinov2_with_registers" and made.weights["pos_embed"][:, 1 : config.num_prefix].any():
        rows = made.weights["pos_embed"][:, 1 : config.num_prefix]
        token = made.weights["reg_token"] + rows
        made = _changed(
            made, {"reg_token": token}, "the registers' rows of the position table are added to the registers"
        )
    if model_type.startswith("dinov2") and config.num_classes and config.decoder != "token_mean":
        head = made.weights["head.weight"]
        both = [head, torch.zeros_like(head)] if config.decoder == "token" else [torch.zeros_like(head), head]
        what = f"decoder {config.decoder!r} is written as class token and mean, with zeros for what it does not read"
        made = _changed(made, {"head.weight": torch.cat(both, dim=1)}, what, decoder="token_mean", fc_norm=True)
    if config.patch_sizes:
        sizes = " ".join(map(str, config.patch_sizes))
        made = _changed(
            made, {}, f"patches of {config.patch_size} px only; it was trained with {sizes}", patch_sizes=()
        )
    if not config.num_classes:
        made = _changed(made, {}, "no classifier: the model's vector is the class token of last_hidden_state")
    return made


def _changed(made: HfModel, weights: Mapping[str, Tensor], note: str, **fields: Any) -> HfModel:
    config = dataclasses.replace(made.config, **fields)
    return made._replace(config=config, weights={**made.weights, **weights}, notes=(*made.notes, note))


def _family_of(config: ViTConfig) -> str:
    if config.positions == "rope2d":
        return "dinov3_vit"
    plain = not config.layer_scale and config.mlp != "swiglu"
    if plain and config.decoder == "token" and config.num_registers == 0:
        return "vit"
    if plain and config.decoder in ("token", "token_pair") and config.num_registers == 1:
        return "deit"
    return "dinov2_with_registers" if config.num_registers else "dinov2"


def _reasons(config: ViTConfig) -> list[str]:
    """Return why transformers cannot express an architecture, whatever the family."""
    pairless = config.layer_scale or config.mlp == "swiglu" or config.num_registers != 1 or config.positions == "rope2d"
    no_head = not config.num_classes and config.decoder != "token"
    rules: list[tuple[Any, str]] = [
        (config.encoder != "patch", f"its encoder is {config.encoder!r}; there only linear patches"),
        (config.patch_norm, "its patches have layer norms (patch_norm)"),
        ("local" in config.attentions, "its attention is local; there every token sees every token"),
        (config.qk_norm, "queries and keys have a layer norm (qk_norm)"),
        (not config.class_token, "it has no class token"),
        (
            config.decoder in ("concat", "attention"),
            f"its decoder is {config.decoder!r}; there class token, or class token and mean",
        ),
        (
            config.decoder == "mean" and config.fc_norm and config.class_token,
            "its decoder 'mean' has its layer norm after pooling (fc_norm)",
        ),
        (
            config.decoder == "token_pair" and pairless,
            "decoder 'token_pair' is DeiT's alone: one register, no LayerScale, no SwiGLU",
        ),
        (
            no_head and config.decoder in ("token_mean", "token_pair", "mean"),
            f"without a classifier, decoder {config.decoder!r} has no place",
        ),
        (
            config.positions == "rope2d" and config.num_classes,
            "rotary positions are DINOv3's, which has no classifier there",
        ),
        (config.positions == "rope2d" and config.head_dim, "DINOv3's heads have no width of their own (head_dim)"),
    ]
    return [reason for applies, reason in rules if applies]


def _mlp_reasons(config: ViTConfig) -> list[str]:
    """Return why DINOv2, whose MLP width is a whole multiple of the embedding's, cannot have this MLP, if so."""
    if _mlp_multiple(config) is not None:
        return []
    how = " × 2/3, a multiple of 8" if config.mlp == "swiglu" else ""
    return [
        f"its MLP is {config.hidden_dim} wide; with these other parts it must be {config.embed_dim} × a whole number{how}"
    ]


def _mlp_multiple(config: ViTConfig) -> int | None:
    widths = {
        swiglu_width(config.embed_dim, n) if config.mlp == "swiglu" else config.embed_dim * n: n
        for n in range(32, 0, -1)
    }
    return widths.get(config.hidden_dim)


def _tensors(made: HfModel, family: Family) -> dict[str, Tensor]:
    rules, _ = family.tables(made.config, ())
    tensors, unknown = to_theirs(made.weights, rules, made.config)
    assert not unknown, unknown
    masks = {"dinov2_with_registers": (1, made.config.embed_dim), "dinov3_vit": (1, 1, made.config.embed_dim)}
    if made.model_type in masks:  # always there, and used in pretraining only
        tensors["embeddings.mask_token"] = torch.zeros(masks[made.model_type])
    if made.model_type == "dinov3_vit" and not made.config.num_registers:
        tensors["embeddings.register_tokens"] = torch.zeros(1, 0, made.config.embed_dim)
    prefix = family.prefix if made.config.num_classes else ""
    return {name if name.startswith("classifier.") else prefix + name: tensor for name, tensor in tensors.items()}


def _split_pair(tensors: dict[str, Tensor], dim: int) -> None:
    """Replace one head over both tokens by the two heads of a distilled DeiT, which transformers averages."""
    weight, bias = tensors.pop("classifier.weight"), tensors.pop("classifier.bias")
    for name, part in zip(("cls", "distillation"), (weight[:, :dim], weight[:, dim:]), strict=True):
        tensors[f"{name}_classifier.weight"] = part * 2
        tensors[f"{name}_classifier.bias"] = bias.clone()


def _settings(made: HfModel) -> dict[str, Any]:
    """Return the architecture as settings of a config.json."""
    config, dino = made.config, made.model_type.startswith("dino")
    settings: dict[str, Any] = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "silu" if config.mlp == "swiglu" else _ACTIVATIONS[config.mlp],
    }
    if made.model_type == "dinov3_vit":
        biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)
        settings |= {**biases, "proj_bias": True, "mlp_bias": True, "rope_theta": 100.0}
        settings |= {"intermediate_size": config.hidden_dim, "use_gated_mlp": config.mlp == "swiglu"}
    else:
        settings["qkv_bias"] = config.qkv_bias
    if dino:
        settings["layerscale_value"] = config.layer_scale
    if made.model_type in ("dinov2_with_registers", "dinov3_vit"):
        settings["num_register_tokens"] = config.num_registers
    if made.model_type.startswith("dinov2"):
        settings |= {"mlp_ratio": _mlp_multiple(config), "use_swiglu_ffn": config.mlp == "swiglu"}
        settings |= {"use_mask_token": False} if made.model_type == "dinov2" else {}
        settings["hidden_act"] = "gelu" if config.mlp == "swiglu" else settings["hidden_act"]  # not used by a gated MLP
    if not dino:
        settings["intermediate_size"] = config.hidden_dim
    if config.head_dim:
        settings["head_dim"] = config.head_dim
    return settings
