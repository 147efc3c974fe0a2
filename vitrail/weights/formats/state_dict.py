"""Bare weights files: which library wrote them, and the model they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data.images.preprocess import crop_fraction_of
from vitrail.lookup import shorten
from vitrail.models.config import ViTConfig
from vitrail.weights import naming as layouts
from vitrail.weights.finalise import RawModel, finalise, with_zero_rows
from vitrail.weights.formats.state_dict_files import StateDict, read_state_dict
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.infer import IMAGENET, Conventions, architecture
from vitrail.weights.key_mapping import Rule, to_ours
from vitrail.weights.naming import has
from vitrail.weights.user_spec import sort_described

# Shortest side to 256, the middle 224: DeiT, DINO, DINOv2 and MAE evaluate so; torchvision too, but bilinear.
CROP_256 = {**IMAGENET, "resize": "crop", "crop_fraction": crop_fraction_of(224, 256), "interpolation": "bicubic"}
# Code of one's own resizes to the model's square; images that are of its size already stay as they are.
WHOLE = {"resize": "squash", "interpolation": "bilinear"}


@dataclass(frozen=True)
class NamingScheme:
    """One way to name a ViT's weights.

    Attributes:
        name: for people.
        is_it: tells the layout from the names of the weights and the containers they were in.
        rules: the table of names, or a function of the weights that returns it.
        left_out: regular expressions of names that belong to the training and not to the model.
        no_row: prefix tokens without a row in the position table: none, or `registers`.
    """

    name: str
    is_it: Callable[[Collection[str], Sequence[str]], bool]
    rules: tuple[Rule, ...] | Callable[[Mapping[str, Tensor]], tuple[Rule, ...]]
    conventions: Conventions
    left_out: tuple[str, ...] = ()
    no_row: str = ""


def _timm_names(names: Collection[str]) -> bool:
    shared = has(names, "blocks.{i}.attn.qkv.weight", "patch_embed.proj.weight")
    return shared and not has(names, "blocks.{i}.gamma_1")


def _vit_pytorch_names(names: Collection[str]) -> bool:
    embeds = any("to_patch_embedding.1." in name for name in names)
    return embeds and has(names, "transformer.layers.{i}.0.norm.weight")


# The first that fits counts.
NAMING_SCHEMES = (
    NamingScheme(
        "torchvision's VisionTransformer",
        lambda names, _: has(names, "encoder.layers.encoder_layer_{i}.ln_1.weight"),
        layouts.TORCHVISION,
        Conventions(preprocess={**CROP_256, "interpolation": "bilinear"}),
    ),
    NamingScheme(
        "MAE (facebookresearch/mae)",
        lambda names, _: _timm_names(names) and "decoder_embed.weight" in names,
        layouts.TIMM,
        Conventions(preprocess=CROP_256),
        left_out=(r"decoder_.*", "mask_token"),
    ),
    NamingScheme(
        "DINOv2 (facebookresearch/dinov2)",
        lambda names, _: has(names, "blocks.{i}.ls1.gamma", "mask_token"),
        layouts.DINOV2,
        Conventions(preprocess=CROP_256),
        left_out=("mask_token", r"(dino|ibot)_head\..*"),
        no_row="registers",
    ),
    NamingScheme(
        "DINO (facebookresearch/dino)",
        lambda names, containers: _timm_names(names) and bool({"teacher", "student"} & set(containers)),
        layouts.TIMM,
        Conventions(preprocess=CROP_256),
        left_out=(r"head\.(mlp|last_layer)\..*",),
    ),
    NamingScheme(
        "DeiT III (facebookresearch/deit)",
        lambda names, _: has(names, "blocks.{i}.gamma_1", "blocks.{i}.attn.qkv.bias", "pos_embed"),
        layouts.DEIT3,
        Conventions(preprocess=CROP_256),
    ),
    NamingScheme(
        "DeiT or MAE, fine-tuned (container 'model')",
        lambda names, containers: _timm_names(names) and bool({"model", "model_ema"} & set(containers)),
        layouts.TIMM,
        Conventions(preprocess=CROP_256),
    ),
    # timm's own files say neither mean nor deviation, and its models have two kinds.
    NamingScheme("timm's VisionTransformer", lambda names, _: _timm_names(names), layouts.TIMM, Conventions()),
    NamingScheme(
        "vit-pytorch's SimpleViT",
        lambda names, _: _vit_pytorch_names(names) and "linear_head.weight" in names,
        layouts.vit_pytorch,
        Conventions(layer_norm_eps=1e-5, positions="sincos2d", preprocess=WHOLE),
    ),
    NamingScheme(
        "vit-pytorch",
        lambda names, _: _vit_pytorch_names(names),
        layouts.vit_pytorch,
        Conventions(layer_norm_eps=1e-5, preprocess=WHOLE),
    ),
    NamingScheme(
        "torch.nn.MultiheadAttention",
        lambda names, _: has(names, "transformer_layers.{i}.self_attention.in_proj_weight"),
        layouts.TORCH_ATTENTION,
        Conventions(layer_norm_eps=1e-5, num_heads=None, preprocess=WHOLE),
    ),
)

# Layouts that cannot be read from one file: (a name that tells, what to do).
_REFUSED = (
    (
        r"((vit|deit|dinov2|dinov2_with_registers|dinov3_vit|vit_mae)\.)?embeddings\.(patch_embeddings|cls_token).*",
        "are those of a transformers model, whose config.json says the rest: give its folder",
    ),
    (r"(visual\.|vision_model\.)?(class_embedding|transformer\.resblocks.*|embeddings\.class_embedding)",
     "are those of CLIP, which normalises tokens before the first block; Vitrail's ViT does not"),
    (r"(blocks\.\d+\.attn\.(q_bias|relative_position_bias_table)|rope\.freqs)",
     "are those of BEiT or EVA, whose file does not tell which; give it as timm:NAME=FILE"),
    (r"norm_pre\.weight", "normalise tokens before the first block, as CLIP; Vitrail's ViT does not"),
)  # fmt: skip


def open_state_dict(name: str, described: Mapping[str, Any] | None = None) -> ImportedModel:
    """Read a weights file that says nothing of its model but names and shapes.

    Args:
        described: what it does not say.

    Raises:
        ValueError: it cannot be read, is of no known layout, something was not described, or weights do not fit.
    """
    said = sort_described(described)
    bare = read_state_dict(Path(name))
    if any("/" in key for key in bare.tensors):
        from vitrail.weights.formats.jax import open_jax

        return open_jax(name, bare.tensors, said)
    bare = bare._replace(tensors=_one_by_one(name, bare.tensors))
    layout = recognise(name, bare)
    tensors = layouts.joined_heads(bare.tensors)
    rules = layout.rules if isinstance(layout.rules, tuple) else layout.rules(tensors)
    left_out = [key for key in tensors if any(re.fullmatch(pattern, key) for pattern in layout.left_out)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out and tensor.numel()}
    # Coming in, these tables look at shapes alone.
    weights, unexpected = to_ours(tensors, rules, ViTConfig(), name)
    weights = _completed(weights, layout)
    config, preprocess, labels, notes = architecture(name, weights, layout.conventions, said)
    notes = [f"names are those of {layout.name}", *bare.notes, *notes]
    found = RawModel(name, weights, tuple(left_out), tuple(unexpected), tuple(notes))
    return finalise(found, config, preprocess, labels)


def _one_by_one(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of a training in chunks, which numbers blocks twice, with each block's number alone.

    Raises:
        ValueError: two blocks get the same number.
    """
    came_from: dict[str, str] = {}
    for key in tensors:
        plain = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
        if plain in came_from:
            raise ValueError(
                f"{name}: {came_from[plain]} and {key} are both {plain}; which of them counts is not known"
            )
        came_from[plain] = key
    return {plain: tensors[key] for plain, key in came_from.items()}


def recognise(name: str, bare: StateDict) -> NamingScheme:
    """Return the layout of a file's names.

    Raises:
        ValueError: it is none, or one that says too little or cannot be expressed.
    """
    names = list(bare.tensors)
    for pattern, why in _REFUSED:
        if any(re.fullmatch(pattern, key) for key in names):
            raise ValueError(f"{name}: its names {why}")
    for layout in NAMING_SCHEMES:
        if layout.is_it(names, bare.containers):
            return layout
    first = ", ".join(sorted(names)[:5])
    raise ValueError(
        f"{name}: its {len(names)} weights ({first}, …) are named like no layout known here: "
        + ", ".join([*(layout.name for layout in NAMING_SCHEMES), "Google's .npz"])
        + "; of a model that timm has, give it as timm:NAME=FILE"
    )


def others_names(word: str, tensors: Mapping[str, Tensor], expected: str) -> str:
    """Return the error for a file given under a library's name, whose weights are not named as that library's."""
    try:
        whose = f"are those of {recognise(word, StateDict(dict(tensors))).name}; give the file alone, without a name"
    except ValueError:
        whose = f"({shorten(sorted(tensors), most=3)}) are of no layout known here"
    return f"{word}: its weights are not named as {expected}: their names {whose}"


def _completed(weights: dict[str, Tensor], layout: NamingScheme) -> dict[str, Tensor]:
    """Return weights with the zeros that a layout leaves unsaid: rows of tokens without position, missing biases."""
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if (table := weights.get("pos_embed")) is not None and table.ndim == 3:
        prefix = int("cls_token" in weights)
        if layout.no_row == "registers":
            weights["pos_embed"] = with_zero_rows(table, prefix, registers)
        elif _is_square(table.shape[1]) and not _is_square(table.shape[1] - prefix - registers):
            weights["pos_embed"] = with_zero_rows(table, 0, prefix + registers)
    for key, kernel in list(weights.items()):
        if key.endswith("attn.proj.weight") and layout.rules is layouts.vit_pytorch:
            weights.setdefault(key.replace("weight", "bias"), torch.zeros(len(kernel)))
    return weights


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count
