"""Dense attention: every token attends to every token, computed in one of two ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Not where the fused kernel gets faster (benchmarks/attention_kernel.py: at 1,601 tokens it still takes twice as long), but
# where the N×N weights get too large to hold: at this many tokens 2 MB a head and picture.
_MATMUL_TOKENS = 1024


def attend(
    q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K M d"], v: Float[Tensor, "B K M d"], *, dropout: float = 0.0
) -> Float[Tensor, "B K N d"]:
    """Return softmax(q kᵀ / √d) v, computed in the way that is faster for these tensors.

    A fixed rule, not a measurement, so that two runs of one configuration compute the same bits. In bfloat16 on CPUs
    PyTorch's fused kernel takes 1.3 to 5.4 times as long in training as the three plain operations
    (benchmarks/attention_kernel.py, figures in benchmarks/RESULTS.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= _MATMUL_TOKENS:
        return attend_matmul(q, k, v, dropout=dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def attend_matmul(
    q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K M d"], v: Float[Tensor, "B K M d"], *, dropout: float = 0.0
) -> Float[Tensor, "B K N d"]:
    """Attention as matmul, softmax, matmul; holds the N×N weights."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = weights.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v
