"""Weights as JAX repositories write them, for tests that read them back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitrail.models.config import ViTConfig
from vitrail.weights.formats.jax_tables import BIG_VISION, VISION_TRANSFORMER
from vitrail.weights.key_mapping import to_theirs


def to_jax(weights: Mapping[str, Tensor], config: ViTConfig, *, big_vision: bool) -> dict[str, Tensor]:
    """Return a model's weights under the names and in the layout of vision_transformer or big_vision, blocks one by one."""
    weights = dict(weights)
    if big_vision and config.class_token and "pos_embed" in weights:
        # There the class token has no position; its row is added to the token, which is the same.
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    tensors, unknown = to_theirs(weights, BIG_VISION if big_vision else VISION_TRANSFORMER, config)
    assert not unknown, unknown
    return tensors


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the blocks stacked along a first dimension, as big_vision's scan over layers writes them."""
    blocks: dict[str, dict[int, Tensor]] = {}
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := re.search(r"encoderblock_(\d+)/", key):
            blocks.setdefault(key.replace(match[0], "encoderblock/"), {})[int(match[1])] = tensor
        else:
            out[key] = tensor
    return out | {key: torch.stack([block[i] for i in sorted(block)]) for key, block in blocks.items()}
