"""Tables of the names that PyTorch libraries give a ViT's weights, one for each library (see `key_mapping`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from einops import rearrange
from torch import Tensor

from vitrail.models.config import ViTConfig
from vitrail.weights.key_mapping import Rule, TensorLayout, translated


def pixels_of(length: int) -> tuple[int, int]:
    """Return the channels and the side of a patch of `length` = C·P² values.

    Raises:
        ValueError: the length fits neither a colour nor a grey square.
    """
    for channels in (1, 3):
        side = math.isqrt(length // channels)
        if channels * side**2 == length:
            return channels, side
    raise ValueError(f"a patch of {length} values is neither P² grey nor 3·P² colour pixels")


def _channels_first(x: Tensor, config: ViTConfig) -> Tensor:
    """Reorder the last dimension, the pixels of a patch: (p q C) → (C p q)."""
    channels, side = pixels_of(x.shape[-1])
    return rearrange(x, "... (p q C) -> ... (C p q)", p=side, q=side, C=channels)


def _channels_last(x: Tensor, config: ViTConfig) -> Tensor:
    channels, side = pixels_of(x.shape[-1])
    return rearrange(x, "... (C p q) -> ... (p q C)", p=side, q=side, C=channels)


def _to_kernel(x: Tensor, config: ViTConfig) -> Tensor:
    channels, side = pixels_of(x.shape[-1])
    return rearrange(x, "D (p q C) -> D C p q", p=side, q=side, C=channels)


PIXELS = TensorLayout(_channels_first, _channels_last)  # einops order of a patch's pixels to a convolution's
KERNEL = TensorLayout(_to_kernel, lambda x, config: rearrange(x, "D C p q -> D (p q C)"))
ONE_ROW = TensorLayout(lambda x, config: x[None], lambda x, config: x[0])  # tokens and tables without a batch dimension
HALVES = TensorLayout(lambda x, config: x.roll(len(x) // 2, 0), lambda x, config: x.roll(len(x) // 2, 0))

# timm's VisionTransformer; DeiT, MAE, DINO and I-JEPA grew from it and kept its names. Ours are the same.
TIMM = (
    Rule("cls_token", "cls_token"),
    Rule("dist_token", "reg_token"),
    Rule("reg_token", "reg_token"),
    Rule("pos_embed", "pos_embed"),
    Rule("patch_embed.{rest}", "patch_embed.{rest}"),
    Rule("blocks.{i}.{rest}", "blocks.{i}.{rest}"),
    Rule("norm.{p}", "norm.{p}"),
    Rule("fc_norm.{p}", "fc_norm.{p}"),
    Rule("attn_pool.{rest}", "decoder.attn_pool.{rest}"),
    Rule("head.{p}", "head.{p}"),
)
# With registers of its own instead of DeiT's distillation token: it matters when weights are written.
TIMM_REGISTERS = tuple(rule for rule in TIMM if rule.theirs != "dist_token")
# A norm after the class token is picked is a norm before: each token is normalised alone.
TOKEN_NORM = Rule("fc_norm.{p}", "norm.{p}")
# timm's GluMlp whose second half is the gate; ours is the first.
GATE_LAST = Rule("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}", HALVES)
SPLIT_GATE = (
    Rule("blocks.{i}.mlp.fc1_g.{p}", "blocks.{i}.mlp.fc1.{p}/0"),
    Rule("blocks.{i}.mlp.fc1_x.{p}", "blocks.{i}.mlp.fc1.{p}/1"),
)
_GAMMAS = (
    Rule("blocks.{i}.gamma_1", "blocks.{i}.ls1.gamma"),
    Rule("blocks.{i}.gamma_2", "blocks.{i}.ls2.gamma"),
)
DEIT3 = (*_GAMMAS, *TIMM_REGISTERS)
EVA = (
    *_GAMMAS,
    Rule("blocks.{i}.attn.q_bias", "blocks.{i}.attn.qkv.bias/0"),
    Rule("", "blocks.{i}.attn.qkv.bias/1"),
    Rule("blocks.{i}.attn.v_bias", "blocks.{i}.attn.qkv.bias/2"),
    *TIMM_REGISTERS,
)
# facebookresearch/dinov2: `register_tokens`, SwiGLU's layers by number; trained with blocks in chunks.
DINOV2 = (
    Rule("register_tokens", "reg_token"),
    Rule("blocks.{i}.mlp.w12.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("blocks.{i}.mlp.w3.{p}", "blocks.{i}.mlp.fc2.{p}"),
    *TIMM_REGISTERS,
)
TORCHVISION = (
    Rule("class_token", "cls_token"),
    Rule("conv_proj.{p}", "patch_embed.proj.{p}"),
    Rule("encoder.pos_embedding", "pos_embed"),
    Rule("encoder.layers.encoder_layer_{i}.ln_1.{p}", "blocks.{i}.norm1.{p}"),
    Rule("encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    Rule("encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    Rule("encoder.layers.encoder_layer_{i}.self_attention.out_proj.{p}", "blocks.{i}.attn.proj.{p}"),
    Rule("encoder.layers.encoder_layer_{i}.ln_2.{p}", "blocks.{i}.norm2.{p}"),
    Rule("encoder.layers.encoder_layer_{i}.mlp.0.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("encoder.layers.encoder_layer_{i}.mlp.3.{p}", "blocks.{i}.mlp.fc2.{p}"),
    # Before torchvision 0.14.
    Rule("encoder.layers.encoder_layer_{i}.mlp.linear_1.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("encoder.layers.encoder_layer_{i}.mlp.linear_2.{p}", "blocks.{i}.mlp.fc2.{p}"),
    Rule("encoder.ln.{p}", "norm.{p}"),
    Rule("heads.head.{p}", "head.{p}"),
)
# A common way to write a ViT around torch.nn.MultiheadAttention.
TORCH_ATTENTION = (
    Rule("cls_token", "cls_token"),
    Rule("pos_embed", "pos_embed"),
    Rule("patch_embedding.patch_embed.{p}", "patch_embed.proj.{p}"),
    Rule("transformer_layers.{i}.layer_norm_1.{p}", "blocks.{i}.norm1.{p}"),
    Rule("transformer_layers.{i}.self_attention.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    Rule("transformer_layers.{i}.self_attention.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    Rule("transformer_layers.{i}.self_attention.out_proj.{p}", "blocks.{i}.attn.proj.{p}"),
    Rule("transformer_layers.{i}.layer_norm_2.{p}", "blocks.{i}.norm2.{p}"),
    Rule("transformer_layers.{i}.mlp.0.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("transformer_layers.{i}.mlp.2.{p}", "blocks.{i}.mlp.fc2.{p}"),
    Rule("mlp_head.0.{p}", "norm.{p}"),
    Rule("mlp_head.1.{p}", "head.{p}"),
)

# vit-pytorch renamed its modules one by one; the names in a file tell its age.
_PLAIN_PATCH = (
    Rule("to_patch_embedding.1.weight", "patch_embed.proj.weight", KERNEL),
    Rule("to_patch_embedding.1.bias", "patch_embed.proj.bias"),
)
_NORMED_PATCH = (
    Rule("to_patch_embedding.1.{p}", "patch_embed.norm_in.{p}", PIXELS),
    Rule("to_patch_embedding.2.weight", "patch_embed.proj.weight", PIXELS),
    Rule("to_patch_embedding.2.bias", "patch_embed.proj.bias"),
    Rule("to_patch_embedding.3.{p}", "patch_embed.norm_out.{p}"),
)
_TOKENS = (Rule("cls_token", "cls_token"), Rule("pos_embedding", "pos_embed"))
_ROW_TOKENS = tuple(rule._replace(layout=ONE_ROW) for rule in _TOKENS)
_WRAPPED_BLOCKS = (
    Rule("transformer.layers.{i}.0.norm.{p}", "blocks.{i}.norm1.{p}"),
    Rule("transformer.layers.{i}.0.fn.to_qkv.{p}", "blocks.{i}.attn.qkv.{p}"),
    Rule("transformer.layers.{i}.0.fn.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
    Rule("transformer.layers.{i}.1.norm.{p}", "blocks.{i}.norm2.{p}"),
    Rule("transformer.layers.{i}.1.fn.net.0.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("transformer.layers.{i}.1.fn.net.3.{p}", "blocks.{i}.mlp.fc2.{p}"),
)
_BLOCKS = (
    Rule("transformer.layers.{i}.0.norm.{p}", "blocks.{i}.norm1.{p}"),
    Rule("transformer.layers.{i}.0.to_qkv.{p}", "blocks.{i}.attn.qkv.{p}"),
    Rule("transformer.layers.{i}.0.to_out.0.{p}", "blocks.{i}.attn.proj.{p}"),
    Rule("transformer.layers.{i}.1.net.0.{p}", "blocks.{i}.norm2.{p}"),
    Rule("transformer.layers.{i}.1.net.1.{p}", "blocks.{i}.mlp.fc1.{p}"),
    Rule("transformer.layers.{i}.1.net.4.{p}", "blocks.{i}.mlp.fc2.{p}"),
)
_SIMPLE_BLOCKS = (
    *_BLOCKS[:2],
    Rule("transformer.layers.{i}.0.to_out.weight", "blocks.{i}.attn.proj.weight"),
    *_BLOCKS[3:5],
    Rule("transformer.layers.{i}.1.net.3.{p}", "blocks.{i}.mlp.fc2.{p}"),
)
_HEAD = (Rule("transformer.norm.{p}", "norm.{p}"), Rule("mlp_head.{p}", "head.{p}"))
_NORMED_HEAD = (Rule("mlp_head.0.{p}", "norm.{p}"), Rule("mlp_head.1.{p}", "head.{p}"))
_SIMPLE_HEAD = (_HEAD[0], Rule("linear_head.{p}", "head.{p}"))


def vit_pytorch(tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Return the table for a vit-pytorch `ViT` or `SimpleViT` of any version, chosen by the names of its weights."""
    if "linear_head.weight" in tensors:
        return (*_NORMED_PATCH, *_SIMPLE_BLOCKS, *_SIMPLE_HEAD)
    rows = "pos_embedding" in tensors and tensors["pos_embedding"].ndim == 2
    return (
        *(_NORMED_PATCH if "to_patch_embedding.2.weight" in tensors else _PLAIN_PATCH),
        *(_ROW_TOKENS if rows else _TOKENS),
        *(_WRAPPED_BLOCKS if has(tensors, "transformer.layers.{i}.0.fn.to_qkv.weight") else _BLOCKS),
        *(_NORMED_HEAD if "mlp_head.1.weight" in tensors else _HEAD),
    )


def join_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a distilled DeiT's tensors with one head over both tokens in place of its two heads.

    The mean of two linear layers is one over both inputs side by side: [W/2, W'/2] and (b + b')/2. Halving is exact.
    """
    if "head_dist.weight" not in tensors or "head.weight" not in tensors:
        return dict(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "head_dist."))}
    weight = torch.cat([tensors["head.weight"], tensors["head_dist.weight"]], dim=1) / 2
    return rest | {"head.weight": weight, "head.bias": (tensors["head.bias"] + tensors["head_dist.bias"]) / 2}


def split_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inverse of `join_heads`; both heads get the mean bias, which is all that is known."""
    if "head.weight" not in tensors:
        return dict(tensors)
    first, second = (2 * tensors["head.weight"]).chunk(2, dim=1)
    return {
        **tensors,
        "head.weight": first.contiguous(),
        "head_dist.weight": second.contiguous(),
        "head_dist.bias": tensors["head.bias"].clone(),
    }


def has(names: Collection[str], *templates: str) -> bool:
    """Whether every template matches one of the names."""
    return all(any(translated(name, (Rule(template, ""),), "theirs") for name in names) for template in templates)
