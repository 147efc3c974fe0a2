"""Which patches are neighbours: the small-block window of local attention.

Tokens are prefix tokens first (class token, registers), then the patches of an h×w grid, row by row. With window k (odd),
patch (i, j) attends to the patches with |Δi| ≤ k//2 and |Δj| ≤ k//2 inside the grid and to all prefix tokens; prefix
tokens attend to all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.kernels.tensor_cache import TensorCache


def reach_of(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Return how many rows and columns a patch sees to each side: half a window, or the grid where that is less."""
    return min(window // 2, grid[0] - 1), min(window // 2, grid[1] - 1)


def covers(grid: tuple[int, int], window: int) -> bool:
    """Whether every patch sees the whole grid, so that local attention is global attention."""
    return window // 2 >= max(grid) - 1


def num_pairs(grid: tuple[int, int], window: int, num_prefix: int) -> int:
    """Return how many (query, key) pairs local attention computes."""
    rows, columns = (
        sum(min(i + reach, side - 1) - max(i - reach, 0) + 1 for i in range(side))
        for side, reach in zip(grid, reach_of(grid, window), strict=True)
    )
    patches = grid[0] * grid[1]
    return rows * columns + patches * num_prefix + num_prefix * (num_prefix + patches)


def window_mask(grid: tuple[int, int], window: int, num_prefix: int) -> Bool[Tensor, "N N"]:
    """Return the dense mask, True where a query (row) attends to a key (column); N² values, for small grids and tests."""
    rows, columns = (torch.arange(side, device="cpu") for side in grid)
    row, column = rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
    near = [(place[:, None] - place[None, :]).abs() <= window // 2 for place in (row, column)]
    mask = torch.ones(num_prefix + len(row), num_prefix + len(row), dtype=torch.bool, device="cpu")
    mask[num_prefix:, num_prefix:] = near[0] & near[1]
    return mask


# All grids that dense attention is the rule for, and not one of the masks that only a kernel asked for by name needs.
_BIASES = TensorCache(limit_bytes=64 * 2**20)


@torch.compiler.assume_constant_result  # else every call of the compiled model would build the mask again
def window_bias(
    grid: tuple[int, int], window: int, num_prefix: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "N N"]:
    """Return the dense mask as what is added to the scores: 0 where a query attends to a key, else -∞."""

    def make() -> Tensor:
        mask = window_mask(grid, window, num_prefix)
        return torch.zeros(mask.shape, dtype=dtype, device="cpu").masked_fill(~mask, float("-inf")).to(device)

    bias = _BIASES.get((grid, window, num_prefix, dtype, device), make)
    # What `torch._dynamo.mark_static` does, but not while compiling: the next grid's mask is no mask of changing size.
    bias._dynamo_static_indices = {0, 1}  # pyright: ignore[reportAttributeAccessIssue]
    return bias
