"""Local attention by PyTorch's FlexAttention, which skips blocks of tokens outside all windows on GPUs."""

from __future__ import annotations

from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vitrail.kernels.tensor_cache import has_no_storage

_BLOCK = 128  # tokens in a block, FlexAttention's own default, which all its kernels' tiles divide

_fused = torch.compile(flex_attention)

# A dict and not `functools.cache`, which torch.compile traces through: it would build the mask again in every call. Masks
# of the last so many grids; one is 0.1 MB at 112 × 112.
_NUM_MASKS = 64
_MASKS: dict[tuple[tuple[int, int], int, int, torch.device], BlockMask] = {}


def attend_flex(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
) -> Float[Tensor, "B K N d"]:
    """Return local attention: a patch attends to the patches at most `window // 2` rows and columns away and the prefix.

    Tokens keep their order, prefix first, then the grid by rows. Numbered by squares instead, a block of 128 tokens would
    see its eight neighbours and itself; of 112 columns and at window 7 the blocks of rows see about as many.

    On CPUs this is for tests: PyTorch holds the N×N scores there, warns of it, and has no backward.

    Args:
        q: Queries; prefix tokens first, which attend to everything, then the patches of the grid by rows.
        k: Keys.
        v: Values.
        grid: Rows and columns of patches.
        window: Side of the window, odd; cut off at the grid's border. May exceed the grid.
        num_prefix: Class token and registers before the patches.

    Source: FlexAttention, Dong et al. 2024 (arXiv:2412.05496).
    """
    assert q.shape[2] == num_prefix + grid[0] * grid[1], (q.shape, grid, num_prefix)
    mask = local_block_mask(grid, window, num_prefix, q.device)
    return (_fused if q.is_cuda else flex_attention)(q, k, v, block_mask=mask)


def local_block_mask(grid: tuple[int, int], window: int, num_prefix: int, device: torch.device) -> BlockMask:
    """Return FlexAttention's mask for the windows of a grid, cached for the next call."""
    if has_no_storage():
        return _build_mask(grid, window, num_prefix, device)
    key = (grid, window, num_prefix, device)
    if key not in _MASKS:
        # A mask first made while evaluating must serve training too: inference tensors cannot be saved for backward.
        with torch.inference_mode(False):
            mask = _build_mask(grid, window, num_prefix, device)
        if len(_MASKS) >= _NUM_MASKS:
            del _MASKS[next(iter(_MASKS))]
        _MASKS[key] = mask
    return _MASKS[key]


def _build_mask(grid: tuple[int, int], window: int, num_prefix: int, device: torch.device) -> BlockMask:
    """Build the mask from the key blocks of each query block; `create_block_mask` would hold N×N integers, 1 GB at 112 × 112."""
    width, radius, tokens = grid[1], window // 2, num_prefix + grid[0] * grid[1]

    @no_type_check  # traced by FlexAttention, which the wrapper that checks annotations in tests does not survive
    def attends(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query - num_prefix, key - num_prefix
        near = ((i // width - j // width).abs() <= radius) & ((i % width - j % width).abs() <= radius)
        return near | (i < 0) | (j < 0)

    needed = needed_blocks(grid, window, num_prefix).to(device)
    order = needed.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        needed.sum(-1, dtype=torch.int32)[None, None],
        order.to(torch.int32)[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=attends,
        seq_lengths=(tokens, tokens),
    )


def needed_blocks(grid: tuple[int, int], window: int, num_prefix: int) -> Tensor:
    """Return, for each block of queries (rows) and of keys (columns), whether any of its queries attends to any of its keys.

    The keys of a block of queries are its patches on the grid, grown by half a window on every side.
    """
    tokens = num_prefix + grid[0] * grid[1]
    member = F.one_hot(torch.arange(tokens, device="cpu") // _BLOCK, -(-tokens // _BLOCK)).T.float()
    patches = member[:, num_prefix:].unflatten(1, grid)
    seen = F.max_pool2d(patches, window, stride=1, padding=window // 2).flatten(1)
    seen = F.pad(seen, (num_prefix, 0), value=1.0)
    seen[: -(-num_prefix // _BLOCK)] = 1.0
    return seen @ member.T > 0
