"""Local attention as dense attention under a mask: N² work, the better way while the grid is hardly larger than a window."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.kernels.window import window_bias


def attend_masked_fused(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B K N d"]:
    """Local attention by PyTorch's fused kernel and an N×N mask."""
    mask = window_bias(grid, window, num_prefix, q.dtype, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attend_masked_matmul(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B K N d"]:
    """Local attention as matmul, mask, softmax, matmul."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores + window_bias(grid, window, num_prefix, q.dtype, q.device)).softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v
