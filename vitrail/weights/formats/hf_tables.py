"""Tables of the names that transformers gives the weights and settings of each family of Vision Transformers.

Taken from transformers 5.23, whose files have the names that all earlier versions wrote. In memory version 5 uses other
names; both are here, so that files of either kind can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.models.config import ViTConfig
from vitrail.weights.key_mapping import Rule, TensorLayout

Tables = tuple[list[Rule], list[Rule]]  # names in files, names in memory

# Registers have no position there; here their rows of the table are zeros.
REGISTER_ROWS = TensorLayout(
    lambda x, config: torch.cat([x[:, :1], x.new_zeros(1, config.num_registers, x.shape[2]), x[:, 1:]], dim=1),
    lambda x, config: torch.cat([x[:, :1], x[:, 1 + config.num_registers :]], dim=1),
)

_START = [
    Rule("embeddings.cls_token", "cls_token"),
    Rule("embeddings.patch_embeddings.projection.{p}", "patch_embed.proj.{p}"),
]
_END = [Rule("layernorm.{p}", "norm.{p}"), Rule("classifier.{p}", "head.{p}")]


def _attention(prefix: str, query: str, key: str, value: str, out: str) -> list[Rule]:
    joined = [
        Rule(f"{prefix}.{part}.{{p}}", f"blocks.{{i}}.attn.qkv.{{p}}/{n}") for n, part in enumerate((query, key, value))
    ]
    return [*joined, Rule(f"{prefix}.{out}.{{p}}", "blocks.{i}.attn.proj.{p}")]


_OLD_ATTENTION = ("attention.query", "attention.key", "attention.value", "output.dense")
_NEW_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _vit(tokens: list[Rule]) -> Tables:
    norms = ("layernorm_before.{p}", "blocks.{i}.norm1.{p}"), ("layernorm_after.{p}", "blocks.{i}.norm2.{p}")
    old = [
        *_attention("encoder.layer.{i}.attention", *_OLD_ATTENTION),
        *(Rule(f"encoder.layer.{{i}}.{theirs}", ours) for theirs, ours in norms),
        Rule("encoder.layer.{i}.intermediate.dense.{p}", "blocks.{i}.mlp.fc1.{p}"),
        Rule("encoder.layer.{i}.output.dense.{p}", "blocks.{i}.mlp.fc2.{p}"),
    ]
    new = [
        *_attention("layers.{i}.attention", *_NEW_ATTENTION),
        *(Rule(f"layers.{{i}}.{theirs}", ours) for theirs, ours in norms),
        *(Rule(f"layers.{{i}}.mlp.fc{n}.{{p}}", f"blocks.{{i}}.mlp.fc{n}.{{p}}") for n in (1, 2)),
    ]
    return [*_START, *tokens, *old, *_END], [*_START, *tokens, *new, *_END]


def vit(config: ViTConfig, absent: Collection[str]) -> Tables:
    """Return the tables of ViT, MAE and MSN."""
    return _vit([Rule("embeddings.position_embeddings", "pos_embed")])


def deit(config: ViTConfig, absent: Collection[str]) -> Tables:
    """Return the tables of DeiT, always with its distillation token, which here is a register."""
    token = Rule("embeddings.distillation_token", "reg_token")
    return _vit([token, Rule("embeddings.position_embeddings", "pos_embed")])


def _scaled(prefix: str) -> list[Rule]:
    """Return the rules for the norms and LayerScale of a DINOv2 or DINOv3 block."""
    norms = [Rule(f"{prefix}.norm{n}.{{p}}", f"blocks.{{i}}.norm{n}.{{p}}") for n in (1, 2)]
    return [*norms, *(Rule(f"{prefix}.layer_scale{n}.lambda1", f"blocks.{{i}}.ls{n}.gamma") for n in (1, 2))]


def _gated(prefix: str) -> list[Rule]:
    return [
        Rule(f"{prefix}.mlp.gate_proj.{{p}}", "blocks.{i}.mlp.fc1.{p}/0"),
        Rule(f"{prefix}.mlp.up_proj.{{p}}", "blocks.{i}.mlp.fc1.{p}/1"),
        Rule(f"{prefix}.mlp.down_proj.{{p}}", "blocks.{i}.mlp.fc2.{p}"),
    ]


def dinov2(config: ViTConfig, absent: Collection[str]) -> Tables:
    """Return the tables of DINOv2, with registers or without."""
    block = "encoder.layer.{i}"
    plain = [Rule(f"{block}.mlp.fc{n}.{{p}}", f"blocks.{{i}}.mlp.fc{n}.{{p}}") for n in (1, 2)]
    packed = [
        Rule(f"{block}.mlp.weights_in.{{p}}", "blocks.{i}.mlp.fc1.{p}"),
        Rule(f"{block}.mlp.weights_out.{{p}}", "blocks.{i}.mlp.fc2.{p}"),
    ]
    swiglu = config.mlp == "swiglu"
    shared = [
        *_START,
        Rule("embeddings.register_tokens", "reg_token"),
        Rule("embeddings.position_embeddings", "pos_embed", REGISTER_ROWS),
        *_scaled(block),
        *_END,
    ]
    old = [*_attention(f"{block}.attention", *_OLD_ATTENTION), *(packed if swiglu else plain)]
    new = [*_attention(f"{block}.attention", *_NEW_ATTENTION), *(_gated(block) if swiglu else plain)]
    return [*shared, *old], [*shared, *new]


def dinov3(config: ViTConfig, absent: Collection[str]) -> Tables:
    """Return the tables of DINOv3; `absent` are the biases that a configuration switches off."""
    start = [
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.patch_embeddings.{p}", "patch_embed.proj.{p}"),
        Rule("embeddings.register_tokens", "reg_token"),
    ]
    without = [
        Rule("", f"blocks.{{i}}.attn.qkv.bias/{n}")
        for n, name in enumerate(("query", "key", "value"))
        if name in absent
    ]
    without += [Rule("", "blocks.{i}.attn.proj.bias")] * ("proj" in absent)
    without += [Rule("", "blocks.{i}.mlp.fc2.bias")] * ("mlp" in absent)
    swiglu = config.mlp == "swiglu"
    if "mlp" in absent:
        without += [Rule("", f"blocks.{{i}}.mlp.fc1.bias{part}") for part in (("/0", "/1") if swiglu else ("",))]
    tables = []
    for block in ("layer.{i}", "model.layer.{i}"):
        plain = [
            Rule(f"{block}.mlp.up_proj.{{p}}", "blocks.{i}.mlp.fc1.{p}"),
            Rule(f"{block}.mlp.down_proj.{{p}}", "blocks.{i}.mlp.fc2.{p}"),
        ]
        attention = _attention(f"{block}.attention", *_NEW_ATTENTION)
        mlp = _gated(block) if swiglu else plain
        tables.append([*start, *without, *attention, *_scaled(block), *mlp, Rule("norm.{p}", "norm.{p}")])
    return tables[0], tables[1]


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        tables: returns the tables of names for an architecture and the biases that are switched off.
        prefix: begins the names of all weights but the classifier's, in a model that has one.
        classes: decoder → transformers' class with a classifier.
        base: transformers' class without a classifier.
        processor: image processor of a folder that names none.
        defaults: values of the settings that a config.json leaves out.
        antialias: whether it resizes its position table with antialiasing.
    """

    tables: Callable[[ViTConfig, Collection[str]], Tables]
    prefix: str
    classes: Mapping[str, str]
    base: str
    processor: str
    defaults: Mapping[str, Any]
    antialias: bool = False


_VIT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_DINOV2 = {key: value for key, value in _VIT.items() if key != "intermediate_size"}
_DINOV2 |= {"mlp_ratio": 4, "layer_norm_eps": 1e-6, "patch_size": 14, "layerscale_value": 1.0, "use_swiglu_ffn": False}
_DINOV3 = {key: value for key, value in _VIT.items() if key != "qkv_bias"}
_DINOV3 |= {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5}
_DINOV3 |= {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
_DINOV3 |= {"layerscale_value": 1.0, "use_gated_mlp": False, "num_register_tokens": 0, "rope_theta": 100.0}

FAMILIES = {
    "vit": Family(vit, "vit.", {"token": "ViTForImageClassification"}, "ViTModel", "ViTImageProcessor", _VIT),
    "deit": Family(
        deit,
        "deit.",
        {"token": "DeiTForImageClassification", "token_pair": "DeiTForImageClassificationWithTeacher"},
        "DeiTModel",
        "DeiTImageProcessor",
        _VIT,
    ),
    "dinov2": Family(
        dinov2,
        "dinov2.",
        {"token_mean": "Dinov2ForImageClassification"},
        "Dinov2Model",
        "BitImageProcessor",
        _DINOV2,
    ),
    "dinov2_with_registers": Family(
        dinov2,
        "dinov2_with_registers.",
        {"token_mean": "Dinov2WithRegistersForImageClassification"},
        "Dinov2WithRegistersModel",
        "BitImageProcessor",
        {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
        antialias=True,
    ),
    "dinov3_vit": Family(dinov3, "", {}, "DINOv3ViTModel", "DINOv3ViTImageProcessor", _DINOV3),
    "vit_mae": Family(vit, "vit.", {}, "ViTMAEModel", "ViTImageProcessor", _VIT),
    "vit_msn": Family(
        vit,
        "vit.",
        {"token": "ViTMSNForImageClassification"},
        "ViTMSNModel",
        "ViTImageProcessor",
        {**_VIT, "layer_norm_eps": 1e-6},
    ),
}

# Weights of pretraining, and of heads that are no classifier: left out, and reported.
LEFT_OUT = r"pooler\..*|(.*\.)?mask_token|decoder\..*"

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
