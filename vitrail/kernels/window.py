"""The window of local attention: its radius, its size and its dense mask.

Tokens are prefix tokens first (class token, registers), then the patches of an h×w grid, row by row. With window k (odd),
patch (i, j) attends to the patches with |Δi| ≤ k//2 and |Δj| ≤ k//2 inside the grid and to all prefix tokens; prefix
tokens attend to all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.kernels.tensor_cache import TensorCache


def radius_of(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Return how many rows and columns a window reaches to each side: half its side, or less where the grid is smaller."""
    return min(window // 2, grid[0] - 1), min(window // 2, grid[1] - 1)


def covers(grid: tuple[int, int], window: int) -> bool:
    """Whether the window of every patch covers the whole grid, so that local attention is global attention."""
    return window // 2 >= max(grid) - 1


def num_pairs(grid: tuple[int, int], window: int, num_prefix: int) -> int:
    """Return the number of (query, key) pairs of local attention."""
    rows, columns = (
        sum(min(i + radius, side - 1) - max(i - radius, 0) + 1 for i in range(side))
        for side, radius in zip(grid, radius_of(grid, window), strict=True)
    )
    patches = grid[0] * grid[1]
    return rows * columns + patches * num_prefix + num_prefix * (num_prefix + patches)


def window_mask(grid: tuple[int, int], window: int, num_prefix: int) -> Bool[Tensor, "N N"]:
    """Return the dense mask, True where a query (row) attends to a key (column); N² values, for small grids and tests."""
    rows, columns = (torch.arange(side, device="cpu") for side in grid)
    row, column = rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
    near = [(position[:, None] - position[None, :]).abs() <= window // 2 for position in (row, column)]
    mask = torch.ones(num_prefix + len(row), num_prefix + len(row), dtype=torch.bool, device="cpu")
    mask[num_prefix:, num_prefix:] = near[0] & near[1]
    return mask


# Room for all grids whose default kernel is dense, but for none of the masks that only a kernel given by name needs.
_BIASES = TensorCache(limit_bytes=64 * 2**20)


@torch.compiler.assume_constant_result  # else every call of the compiled model would build the mask again
def window_bias(
    grid: tuple[int, int], window: int, num_prefix: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "N N"]:
    """Return the dense mask as a bias for the scores: 0 where a query attends to a key, else -∞."""

    def make() -> Tensor:
        mask = window_mask(grid, window, num_prefix)
        return torch.zeros(mask.shape, dtype=dtype, device="cpu").masked_fill(~mask, float("-inf")).to(device)

    bias = _BIASES.get((grid, window, num_prefix, dtype, device), make)
    # As `torch._dynamo.mark_static` would, but not while compiling: else the next grid's mask would be one of dynamic size.
    bias._dynamo_static_indices = {0, 1}  # pyright: ignore[reportAttributeAccessIssue]
    return bias
