"""Dense attention, where every query is multiplied with every key: fused, or as two matrix products."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend_fused(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K M d"],
    v: Float[Tensor, "B K M d"],
    *,
    bias: Float[Tensor, "N M"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B K N d"]:
    """Return softmax(q kᵀ / √d + bias) v by PyTorch's fused kernel, which never holds the N×M weights."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def attend_matmul(
    q: Float[Tensor, "*batch N d"],
    k: Float[Tensor, "*batch M d"],
    v: Float[Tensor, "*batch M d"],
    *,
    bias: Float[Tensor, "*#batch N M"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch N d"]:
    """Return softmax(q kᵀ / √d + bias) v by two matrix products, which hold the N×M weights.

    In bfloat16 on CPUs the fused kernel takes 1.3 to 5.4 times as long in training (benchmarks/attention_kernel.py,
    figures in benchmarks/RESULTS.md).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v


def empty_heads(like: Float[Tensor, "B K N d"], *copies: int) -> Tensor:
    """Return an empty tensor [*copies, B, K, N, d] whose memory has all heads of a token together, as linear layers need them."""
    batch, heads, tokens, width = like.shape
    return like.new_empty(*copies, batch, tokens, heads, width).transpose(-3, -2)
