"""Attention over several images packed into one sequence: each token attends within its own image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def attend_packed(
    q: Float[Tensor, "1 K N d"],
    k: Float[Tensor, "1 K N d"],
    v: Float[Tensor, "1 K N d"],
    grids: Sequence[tuple[int, int]],
    num_prefix: int,
    attend: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor],
) -> Float[Tensor, "1 K N d"]:
    """Return attention under the block-diagonal mask of the images (Dehghani et al. 2023, NaViT, section 2.1).

    The mask is never built: consecutive images of equal grids are computed as one batch, so time and memory are those of
    each image alone, and not of N×N.

    Args:
        grids: patch rows and columns of each image; its prefix tokens come before its patches.
        attend: computes the attention of a batch of images of one grid.
    """
    out, start = [], 0
    for grid, group in groupby(grids):
        length = num_prefix + grid[0] * grid[1]
        end = start + length * len(list(group))
        batch = [rearrange(x[:, :, start:end], "1 K (n N) d -> n K N d", N=length) for x in (q, k, v)]
        out.append(rearrange(attend(batch[0], batch[1], batch[2], grid), "n K N d -> 1 K (n N) d"))
        start = end
    assert start == q.shape[2], (grids, num_prefix, q.shape)
    return torch.cat(out, dim=2)
