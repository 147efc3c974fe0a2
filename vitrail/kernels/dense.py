"""Dense attention: every token attends to every token, computed in one of two ways."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend_fused(
    q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K M d"], v: Float[Tensor, "B K M d"], *, dropout: float = 0.0
) -> Float[Tensor, "B K N d"]:
    """Return softmax(q kᵀ / √d) v by PyTorch's fused kernel, which never holds the N×M weights."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def attend_matmul(
    q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K M d"], v: Float[Tensor, "B K M d"], *, dropout: float = 0.0
) -> Float[Tensor, "B K N d"]:
    """Return the same as matmul, softmax, matmul; holds the N×M weights.

    In bfloat16 on CPUs the fused kernel takes 1.3 to 5.4 times as long in training (benchmarks/attention_kernel.py,
    figures in benchmarks/RESULTS.md).
    """
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = weights.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v
