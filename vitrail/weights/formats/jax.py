"""Read `.npz` files of vision_transformer and big_vision (JAX): weights, architecture, and the preprocessing of their evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.data.images.preprocess import crop_fraction_of
from vitrail.models.config import ViTConfig
from vitrail.weights.finalise import RawModel, depth_of, finalise, mlp_ratio, plain_labels, table_grid, with_zero_rows
from vitrail.weights.formats.jax_tables import BIG_VISION, VISION_TRANSFORMER
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.infer import to_preprocess
from vitrail.weights.key_mapping import to_ours
from vitrail.weights.user_spec import UserSpec


class ParameterTree(NamedTuple):
    """The arrays of a file that belong to its image model.

    Attributes:
        tensors: the arrays by name without the prefix, blocks one by one.
        outside: names in the file that belong to something else, such as the text tower.
        prefix: what the names of the image model began with, such as `params/img/`.
    """

    tensors: dict[str, Tensor]
    outside: tuple[str, ...] = ()
    prefix: str = ""


def open_jax(name: str, tensors: Mapping[str, Tensor], user_spec: UserSpec) -> ImportedModel:
    """Return the model of a JAX checkpoint's arrays.

    Args:
        name: the file, for messages and the report.

    Raises:
        ValueError: the arrays are no ViT, something needed was not described, or weights are missing or too many.
    """
    tree = read_tree(name, tensors)
    is_vision_transformer = any("MultiHeadDotProductAttention_1" in key for key in tree.tensors)
    left_out = [*tree.outside, *_representation_names(name, tree.tensors)]
    kept = {key: tensor for key, tensor in tree.tensors.items() if not key.startswith("pre_logits/")}
    facts = jax_architecture(name, kept)
    wrong = [
        f"{key} {value!r} (its weights have {facts[key]!r})"
        for key, value in user_spec.model.items()
        if key in facts and key not in ("image_size", "patch_size", "mlp_ratio") and facts[key] != value
    ]
    if wrong:
        raise ValueError(f"{name}: its weights contradict what was described: {', '.join(wrong)}")
    fields = {"mlp": "gelu", **facts, **user_spec.model}
    if "image_size" not in fields:
        raise ValueError(
            f"{name}: its positions are computed (sincos2d) and not in the file; make a model file that says the image size "
            f"it was trained with: vitrail export {name} --to vitrail --describe image_size=224"
        )
    config = ViTConfig(**fields)
    weights, unexpected = to_ours(kept, VISION_TRANSFORMER if is_vision_transformer else BIG_VISION, config, name)
    if "pos_embed" in weights and not is_vision_transformer and config.class_token:
        weights["pos_embed"] = with_zero_rows(weights["pos_embed"], 0, 1)
    published, notes = _published_preprocess(is_vision_transformer, tree, config)
    preprocess = to_preprocess(config, {**published, **user_spec.preprocess})
    if "mlp" not in user_spec.model:
        notes.append(
            "mlp gelu, as timm and transformers read such files; JAX computed its tanh form: --describe mlp=gelu_tanh"
        )
    if config.num_classes and not user_spec.labels:
        notes.append("labels are numbers: the file names none; --describe labels=…")
    labels = user_spec.labels or plain_labels(config.num_classes)
    if len(labels) != config.num_classes:
        raise ValueError(f"{name}: {len(labels)} labels were described, but its head has {config.num_classes} classes")
    raw = RawModel(name, weights, tuple(left_out), tuple(unexpected), tuple(notes))
    return finalise(raw, config, preprocess, labels)


def read_tree(name: str, tensors: Mapping[str, Tensor]) -> ParameterTree:
    """Return the arrays of a file's image model, without the prefix of their names.

    Raises:
        ValueError: there is no ViT in the file.
    """
    for prefix in ("opt/target/", "params/img/", "params/", "img/", ""):
        if f"{prefix}embedding/kernel" in tensors:
            inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            outside = tuple(key for key in tensors if not key.startswith(prefix))
            return ParameterTree(_unstacked(inside), outside, prefix)
    examples = ", ".join(sorted(tensors)[:5])
    raise ValueError(
        f"{name}: no ViT of vision_transformer or big_vision: embedding/kernel is not among its {len(tensors)} arrays "
        f"({examples}, …)"
    )


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the blocks one by one, where a file has them stacked along a first dimension (scan over layers)."""
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if "Transformer/encoderblock/" in key:
            for number, block in enumerate(tensor.unbind(0)):
                out[key.replace("encoderblock/", f"encoderblock_{number}/")] = block
        else:
            out[key] = tensor
    return out


def _representation_names(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layer between pooling and head, which may be left out where no head follows.

    Raises:
        ValueError: a head follows; a linear layer with tanh cannot be folded into it.
    """
    names = [key for key in tensors if key.startswith("pre_logits/")]
    if names and "head/kernel" in tensors:
        raise ValueError(
            f"{name}: its head reads a tanh layer (pre_logits), which Vitrail's ViT does not have; leave head and "
            "pre_logits out of the file to use it without its classes"
        )
    return names


def jax_architecture(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that the arrays tell.

    Raises:
        ValueError: a weight that every ViT has is missing, or a block is.
    """
    queries = [key for key in tensors if re.fullmatch(r"Transformer/encoderblock_0/.*/query/kernel", key)]
    hidden = [key for key in tensors if re.fullmatch(r"Transformer/encoderblock_0/.*/Dense_0/kernel", key)]
    if not queries or not hidden:
        raise ValueError(f"{name}: no block 0 in it; the file may be cut off, or is no ViT")
    kernel, query = tensors["embedding/kernel"], tensors[queries[0]]
    width, heads, head_dim = query.shape
    facts: dict[str, Any] = {
        "embed_dim": width,
        "num_heads": heads,
        "depth": depth_of(tensors, r".*encoderblock_(\d+)/", name),
        "mlp_ratio": mlp_ratio(tensors[hidden[0]].shape[1], width),
        "class_token": "cls" in tensors,
        "num_classes": tensors["head/kernel"].shape[1] if "head/kernel" in tensors else 0,
        **({"head_dim": head_dim} if head_dim * heads != width else {}),
        **_stem(name, tensors, kernel),
        **_pooling(tensors),
    }
    table = tensors.get("pos_embedding", tensors.get("Transformer/posembed_input/pos_embedding"))
    if table is None:
        return facts | {"positions": "sincos2d"}
    has_class_row = facts["class_token"] and "pos_embedding" not in tensors
    side = table_grid(table, int(has_class_row), f"{name}: pos_embedding")[0]
    return facts | {"positions": "learned", "image_size": side * facts["patch_size"]}


def _stem(name: str, tensors: Mapping[str, Tensor], kernel: Tensor) -> dict[str, Any]:
    """Return the fields of the encoder: its kind, its stride and its channels."""
    if "conv_root/kernel" not in tensors:
        return {"patch_size": kernel.shape[0], "in_channels": kernel.shape[2]}
    stages = len({key.split("/")[0] for key in tensors if re.match(r"block\d+/", key)})
    if kernel.shape[0] != 1 or stages not in (3, 4):
        raise ValueError(
            f"{name}: a hybrid of {stages} ResNet stages with patches of {kernel.shape[0]}; expected patches of 1 after 3 "
            "or 4 stages (encoder r50)"
        )
    # Three stages, the last of 9 blocks, make stride 16; four make 32.
    return {
        "encoder": "r50",
        "patch_size": 16 if stages == 3 else 32,
        "in_channels": tensors["conv_root/kernel"].shape[2],
    }


def _pooling(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of the decoder."""
    if "MAPHead_0/probe" in tensors:
        return {"decoder": "attention"}
    if "cls" in tensors:
        return {"decoder": "token"}
    return {"decoder": "mean", "fc_norm": False}


def _published_preprocess(
    is_vision_transformer: bool, tree: ParameterTree, config: ViTConfig
) -> tuple[dict[str, Any], list[str]]:
    """Return the preprocessing with which the repository evaluates such weights, and a note.

    Source: vision_transformer, vit_jax/input_pipeline.py (resize to a square); big_vision, configs/vit_s16_i1k.py
    (`resize_small(256)|central_crop(224)`) and proj/image_text for two towers (`resize(256)`); all in -1 to 1.
    """
    size, half = config.image_size, (0.5,) * config.in_channels
    shared: dict[str, Any] = {"interpolation": "bilinear", "mean": half, "std": half}
    if is_vision_transformer or "img/" in tree.prefix:
        resizing, how = {"resize": "squash"}, f"squash to {size}×{size}"
    else:
        side = round(size * 256 / 224)
        resizing, how = (
            {"resize": "crop", "crop_fraction": crop_fraction_of(size, side)},
            f"shortest side {side}, then the centre",
        )
    source = "vision_transformer" if is_vision_transformer else "big_vision"
    return shared | resizing, [
        f"preprocessing is that of {source}'s own evaluation: {how}, bilinear, -1 to 1; resized with Pillow's antialiasing"
    ]
