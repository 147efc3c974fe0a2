"""Tilings of local attention: a tile of neighbouring queries shares one rectangle of keys, its halo.

A th×tw tile of queries whose windows have radius r needs the (th+2r)×(tw+2r) patches around it, and the prefix. Each tile
is then a small dense attention under a mask: (t+k-1)² scores a query for tiles of side t, instead of N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.kernels.dense import attend_matmul
from vitrail.kernels.window import radius_of

# What copying one value of a halo costs, in multiply-adds of one score. At window 7 this number takes tiles of 4×7 where
# they fit, which were fastest or within noise of it in both number formats (benchmarks/tile_sizes.py), and larger tiles for
# larger windows.
_COPY_COST = 24
_TILE_SIDES = range(2, 17)


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles.

    Attributes:
        grid: patch rows and columns (h, w).
        radius: rows and columns that a window reaches to each side.
        tile: rows and columns of a tile of queries; the last tiles may exceed the grid.
        num_prefix: number of prefix tokens, which are keys of every tile.
    """

    grid: tuple[int, int]
    radius: tuple[int, int]
    tile: tuple[int, int]
    num_prefix: int

    @property
    def tiles(self) -> tuple[int, int]:
        """Numbers of tiles down and across."""
        return -(-self.grid[0] // self.tile[0]), -(-self.grid[1] // self.tile[1])

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns of keys that a tile needs."""
        return self.tile[0] + 2 * self.radius[0], self.tile[1] + 2 * self.radius[1]

    @property
    def num_queries(self) -> int:
        """Number of queries of a tile."""
        return self.tile[0] * self.tile[1]

    @property
    def num_keys(self) -> int:
        """Number of keys of a tile, with the prefix."""
        return self.num_prefix + self.halo[0] * self.halo[1]

    @property
    def spread(self) -> tuple[int, int]:
        """Rows and columns that all halos together cover, with those beyond the grid's edges."""
        return tuple(n * t + 2 * r for n, t, r in zip(self.tiles, self.tile, self.radius, strict=True))  # pyright: ignore[reportReturnType]

    @property
    def num_scores(self) -> int:
        """Number of (query, key) pairs that are computed, most of them masked."""
        return self.tiles[0] * self.tiles[1] * self.num_queries * self.num_keys


def tiling_of(grid: tuple[int, int], window: int, num_prefix: int) -> Tiling:
    """Return the tiling of least estimated cost: large tiles compute more masked scores, small ones copy more keys."""
    return Tiling(grid, radius_of(grid, window), _tile_of(grid, window, num_prefix), num_prefix)


@torch.compiler.assume_constant_result  # hundreds of tilings are compared, which torch.compile would trace one by one
def _tile_of(grid: tuple[int, int], window: int, num_prefix: int) -> tuple[int, int]:
    return _best_tile(grid, window, num_prefix)


@lru_cache(maxsize=256)
def _best_tile(grid: tuple[int, int], window: int, num_prefix: int) -> tuple[int, int]:
    radius = radius_of(grid, window)
    sides = [sorted({min(side, most) for side in _TILE_SIDES}) for most in grid]
    choices = [Tiling(grid, radius, (rows, columns), num_prefix) for rows in sides[0] for columns in sides[1]]
    return min(choices, key=lambda tiling: tiling.num_scores * (1 + _COPY_COST / tiling.num_queries)).tile


def tile_bias(
    tiling: Tiling, rows: Int64[Tensor, " rows"], columns: Int64[Tensor, " columns"], dtype: torch.dtype
) -> Float[Tensor, "rows columns queries keys"]:
    """Return the bias that is added to the scores of some tiles: 0 where a query attends to a key, else -∞.

    Queries beyond the grid's edge, whose results are not used, attend to all: a softmax over no keys would be NaN.

    Args:
        rows: indices of the tile rows.
        columns: indices of the tile columns.
    """
    axes = []
    for side, number, tile, halo, radius in zip(
        tiling.grid, (rows, columns), tiling.tile, tiling.halo, tiling.radius, strict=True
    ):
        start, device = number[:, None] * tile, number.device
        query, key = start + torch.arange(tile, device=device), start + torch.arange(halo, device=device) - radius
        query, key = query[:, :, None], key[:, None, :]
        axes.append((((query - key).abs() <= radius) & (key >= 0) & (key < side), query >= side))
    (down, below), (across, right) = axes
    seen = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]
    outside = below[:, None, :, None, :, None] | right[None, :, None, :, None, :]
    seen = (seen | outside).flatten(4, 5).flatten(2, 3)
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))
    return F.pad(bias, (tiling.num_prefix, 0))


def attend_tiles_plain(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B K N d"]:
    """Return local attention in tiles, computed for all tiles at once by PyTorch's own operations.

    For `torch.compile` on GPUs and for export: every compiler knows these operations. Training saves the halos and the
    weights of all tiles, a constant multiple of N; `attend_tiles` saves none.
    """
    tiling = tiling_of(grid, window, num_prefix)
    queries = _tiles(q[:, :, num_prefix:], tiling)
    keys, values = (_halos(x, tiling) for x in (k, v))
    rows, columns = (torch.arange(count, device=q.device) for count in tiling.tiles)
    bias = tile_bias(tiling, rows, columns, q.dtype).flatten(0, 1)
    out = _untile(attend_matmul(queries, keys, values, bias=bias, dropout=dropout), tiling)
    if not num_prefix:
        return out
    return torch.cat([attend_matmul(q[:, :, :num_prefix], k, v, dropout=dropout), out], dim=2)


def _tiles(x: Float[Tensor, "B K hw d"], tiling: Tiling) -> Float[Tensor, "B K T queries d"]:
    (h, w), (th, tw), (nh, nw) = tiling.grid, tiling.tile, tiling.tiles
    x = F.pad(x.unflatten(2, (h, w)), (0, 0, 0, nw * tw - w, 0, nh * th - h))
    x = x.unflatten(3, (nw, tw)).unflatten(2, (nh, th))
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _untile(x: Float[Tensor, "B K T queries d"], tiling: Tiling) -> Float[Tensor, "B K hw d"]:
    (h, w), (th, tw), (nh, nw) = tiling.grid, tiling.tile, tiling.tiles
    x = x.unflatten(3, (th, tw)).unflatten(2, (nh, nw)).transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)[:, :, :h, :w].flatten(2, 3)


def _halos(x: Float[Tensor, "B K N d"], tiling: Tiling) -> Float[Tensor, "B K T keys d"]:
    (h, w), (th, tw), (rh, rw), (sh, sw) = tiling.grid, tiling.tile, tiling.radius, tiling.halo
    rows, columns = tiling.spread
    padded = F.pad(x[:, :, tiling.num_prefix :].unflatten(2, (h, w)), (0, 0, rw, columns - rw - w, rh, rows - rh - h))
    halos = padded.unfold(2, sh, th).unfold(3, sw, tw)  # B K nh nw d sh sw
    halos = halos.flatten(2, 3).flatten(4, 5).transpose(3, 4)
    if not tiling.num_prefix:
        return halos
    prefix = x[:, :, None, : tiling.num_prefix].expand(-1, -1, halos.shape[2], -1, -1)
    return torch.cat([prefix, halos], dim=3)
