"""Attention over several pictures packed into one row: each token sees its own picture only."""

from __future__ import annotations

from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vitrail.kernels.dense import attend


def attend_packed(
    q: Float[Tensor, "1 K N d"],
    k: Float[Tensor, "1 K N d"],
    v: Float[Tensor, "1 K N d"],
    lengths: tuple[int, ...],
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "1 K N d"]:
    """Return attention under the block-diagonal mask of `lengths` (Dehghani et al. 2023, NaViT, section 2.1).

    The mask is never made: neighbours of equal length are one batch of ordinary attention, so time and memory are
    those of each picture alone, and not of N×N.
    """
    assert sum(lengths) == q.shape[2], (lengths, q.shape)
    out, start = [], 0
    for length, group in groupby(lengths):
        end = start + length * len(list(group))
        parts = (rearrange(x[:, :, start:end], "1 K (n N) d -> n K N d", N=length) for x in (q, k, v))
        out.append(rearrange(attend(*parts, dropout=dropout), "n K N d -> 1 K (n N) d"))
        start = end
    return torch.cat(out, dim=2)
