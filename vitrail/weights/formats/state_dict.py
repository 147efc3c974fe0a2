"""Read weights files that say nothing of their model: recognise the naming scheme, then infer the architecture."""

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
from vitrail.weights import naming
from vitrail.weights.finalise import RawModel, finalise, with_zero_rows
from vitrail.weights.formats.state_dict_files import StateDict, read_state_dict
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.infer import IMAGENET, Conventions, infer_architecture
from vitrail.weights.key_mapping import Rule, to_ours
from vitrail.weights.naming import has
from vitrail.weights.user_spec import to_user_spec

# Shortest side to 256, the middle 224: DeiT, DINO, DINOv2 and MAE evaluate so; torchvision too, but bilinear.
CROP_256 = {**IMAGENET, "resize": "crop", "crop_fraction": crop_fraction_of(224, 256), "interpolation": "bicubic"}
# For code that users wrote themselves: resize to the model's square; images of that size already stay as they are.
WHOLE = {"resize": "squash", "interpolation": "bilinear"}


@dataclass(frozen=True)
class NamingScheme:
    """The names that one library gives the weights of a ViT, and what its code does with them.

    Attributes:
        name: the library, for people.
        matches: whether a file follows this scheme, from the names of its weights and the containers that held them.
        rules: the table of names, or a function that returns it for given weights.
        conventions: what the library's code does where shapes do not tell.
        left_out: regular expressions for names that belong to the training and not to the model.
        registers_without_position: whether registers have no row in the position table.
    """

    name: str
    matches: Callable[[Collection[str], Sequence[str]], bool]
    rules: tuple[Rule, ...] | Callable[[Mapping[str, Tensor]], tuple[Rule, ...]]
    conventions: Conventions
    left_out: tuple[str, ...] = ()
    registers_without_position: bool = False


def _timm_names(names: Collection[str]) -> bool:
    shared = has(names, "blocks.{i}.attn.qkv.weight", "patch_embed.proj.weight")
    return shared and not has(names, "blocks.{i}.gamma_1")


def _vit_pytorch_names(names: Collection[str]) -> bool:
    embeds = any("to_patch_embedding.1." in name for name in names)
    return embeds and has(names, "transformer.layers.{i}.0.norm.weight")


# The first scheme that matches counts.
NAMING_SCHEMES = (
    NamingScheme(
        "torchvision's VisionTransformer",
        lambda names, _: has(names, "encoder.layers.encoder_layer_{i}.ln_1.weight"),
        naming.TORCHVISION,
        Conventions(preprocess={**CROP_256, "interpolation": "bilinear"}),
    ),
    NamingScheme(
        "MAE (facebookresearch/mae)",
        lambda names, _: _timm_names(names) and "decoder_embed.weight" in names,
        naming.TIMM,
        Conventions(preprocess=CROP_256),
        left_out=(r"decoder_.*", "mask_token"),
    ),
    NamingScheme(
        "DINOv2 (facebookresearch/dinov2)",
        lambda names, _: has(names, "blocks.{i}.ls1.gamma", "mask_token"),
        naming.DINOV2,
        Conventions(preprocess=CROP_256),
        left_out=("mask_token", r"(dino|ibot)_head\..*"),
        registers_without_position=True,
    ),
    NamingScheme(
        "DINO (facebookresearch/dino)",
        lambda names, containers: _timm_names(names) and bool({"teacher", "student"} & set(containers)),
        naming.TIMM,
        Conventions(preprocess=CROP_256),
        left_out=(r"head\.(mlp|last_layer)\..*",),
    ),
    NamingScheme(
        "DeiT III (facebookresearch/deit)",
        lambda names, _: has(names, "blocks.{i}.gamma_1", "blocks.{i}.attn.qkv.bias", "pos_embed"),
        naming.DEIT3,
        Conventions(preprocess=CROP_256),
    ),
    NamingScheme(
        "DeiT or MAE, fine-tuned (container 'model')",
        lambda names, containers: _timm_names(names) and bool({"model", "model_ema"} & set(containers)),
        naming.TIMM,
        Conventions(preprocess=CROP_256),
    ),
    # timm's own files say neither mean nor deviation, and its models have two kinds.
    NamingScheme("timm's VisionTransformer", lambda names, _: _timm_names(names), naming.TIMM, Conventions()),
    NamingScheme(
        "vit-pytorch's SimpleViT",
        lambda names, _: _vit_pytorch_names(names) and "linear_head.weight" in names,
        naming.vit_pytorch,
        Conventions(layer_norm_eps=1e-5, positions="sincos2d", preprocess=WHOLE),
    ),
    NamingScheme(
        "vit-pytorch",
        lambda names, _: _vit_pytorch_names(names),
        naming.vit_pytorch,
        Conventions(layer_norm_eps=1e-5, preprocess=WHOLE),
    ),
    NamingScheme(
        "torch.nn.MultiheadAttention",
        lambda names, _: has(names, "transformer_layers.{i}.self_attention.in_proj_weight"),
        naming.TORCH_ATTENTION,
        Conventions(layer_norm_eps=1e-5, num_heads=None, preprocess=WHOLE),
    ),
)

# Naming schemes that cannot be read from one file: a regular expression for a telling name, and what to do.
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


def open_state_dict(name: str, description: Mapping[str, Any] | None = None) -> ImportedModel:
    """Return the model of a weights file that has names and shapes alone.

    Args:
        description: what the file does not say: fields of `ViTConfig` and `Preprocess`, and `labels`.

    Raises:
        ValueError: the file cannot be read or follows no known naming scheme, something needed was not described, or
            weights do not fit.
    """
    user_spec = to_user_spec(description)
    state_dict = read_state_dict(Path(name))
    if any("/" in key for key in state_dict.tensors):
        from vitrail.weights.formats.jax import open_jax

        return open_jax(name, state_dict.tensors, user_spec)
    state_dict = state_dict._replace(tensors=_without_chunks(name, state_dict.tensors))
    scheme = recognise(name, state_dict)
    tensors = naming.join_heads(state_dict.tensors)
    rules = scheme.rules if isinstance(scheme.rules, tuple) else scheme.rules(tensors)
    left_out = [key for key in tensors if any(re.fullmatch(pattern, key) for pattern in scheme.left_out)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out and tensor.numel()}
    # Any architecture will do: for reading, these tables use shapes alone.
    weights, unexpected = to_ours(tensors, rules, ViTConfig(), name)
    weights = _completed(weights, scheme)
    config, preprocess, labels, notes = infer_architecture(name, weights, scheme.conventions, user_spec)
    notes = [f"names are those of {scheme.name}", *state_dict.notes, *notes]
    raw = RawModel(name, weights, tuple(left_out), tuple(unexpected), tuple(notes))
    return finalise(raw, config, preprocess, labels)


def _without_chunks(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with one number for each block, where blocks were trained in chunks and have two.

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


def recognise(name: str, state_dict: StateDict) -> NamingScheme:
    """Return the naming scheme that a file follows.

    Raises:
        ValueError: it follows none, or one that says too little or cannot be expressed.
    """
    names = list(state_dict.tensors)
    for pattern, why in _REFUSED:
        if any(re.fullmatch(pattern, key) for key in names):
            raise ValueError(f"{name}: its names {why}")
    for scheme in NAMING_SCHEMES:
        if scheme.matches(names, state_dict.containers):
            return scheme
    first = ", ".join(sorted(names)[:5])
    raise ValueError(
        f"{name}: its {len(names)} weights ({first}, …) follow no naming scheme known here: "
        + ", ".join([*(scheme.name for scheme in NAMING_SCHEMES), "Google's .npz"])
        + "; of a model that timm has, give it as timm:NAME=FILE"
    )


def foreign_names_error(origin: str, tensors: Mapping[str, Tensor], expected: str) -> str:
    """Return the message for a file that was given as one library's and whose weights are named as another's."""
    try:
        whose = f"are those of {recognise(origin, StateDict(dict(tensors))).name}; give the file alone, without a name"
    except ValueError:
        whose = f"({shorten(sorted(tensors), most=3)}) follow no naming scheme known here"
    return f"{origin}: its weights are not named as {expected}: their names {whose}"


def _completed(weights: dict[str, Tensor], scheme: NamingScheme) -> dict[str, Tensor]:
    """Return weights with zeros for what a scheme has not: position rows of some tokens, biases of projections."""
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if (table := weights.get("pos_embed")) is not None and table.ndim == 3:
        prefix = int("cls_token" in weights)
        if scheme.registers_without_position:
            weights["pos_embed"] = with_zero_rows(table, prefix, registers)
        elif _is_square(table.shape[1]) and not _is_square(table.shape[1] - prefix - registers):
            weights["pos_embed"] = with_zero_rows(table, 0, prefix + registers)
    for key, kernel in list(weights.items()):
        if key.endswith("attn.proj.weight") and scheme.rules is naming.vit_pytorch:
            weights.setdefault(key.replace("weight", "bias"), torch.zeros(len(kernel)))
    return weights


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count
