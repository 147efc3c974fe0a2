"""Local attention in tiles on the CPU: exact, differentiable, with memory that grows linearly in N.

Tiles are computed a few at a time, in buffers that stay in the processor's cache. The backward pass recomputes the weights
from q, k and v. FlashAttention-2 saves the output and the log-sum-exp for that (Dao 2023, section 3.1); a tile has all
its keys at once, so its softmax is simply computed again, and nothing else is saved. All sums are added in one order, so
results are bit-identical from run to run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vitrail.kernels.dense import empty_heads
from vitrail.kernels.forward_mode import refuse_forward_mode
from vitrail.kernels.tensor_cache import TensorCache
from vitrail.kernels.tiling import Tiling, tile_bias, tiling_of

# Scores of the tiles that a thread computes together. With less, starting operations costs most; with more, buffers leave
# the second-level cache. From 768 KB to 1.5 MB none was best throughout (benchmarks/tile_sizes.py); this one takes least memory.
_CHUNK_BYTES = 768 * 1024

HeadGroup = tuple[int, slice]  # index of a sample, and the slice of its heads


def attend_tiles(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "B K N d"]:
    """Return softmax(q kᵀ / √d) v, where each patch attends to its window and the prefix (see `vitrail.kernels.window`).

    For CPUs. `torch.compile` treats it as one opaque operation. Second derivatives are not defined.

    Args:
        q: queries, prefix tokens first, then the patches row by row; any strides.
        grid: patch rows and columns (h, w), with num_prefix + h·w = N.
        window: side k of the window, patches, odd; may exceed the grid.
        dropout: fraction of the attention weights to drop.
    """
    assert q.shape[2] == num_prefix + grid[0] * grid[1], (q.shape, grid, num_prefix)
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    refuse_forward_mode("tiles", q, k, v)
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    return _attend(q, k, v, seed, grid[0], grid[1], window, num_prefix, dropout)


# The schemas are written out: torch cannot infer them where annotations are executed, as in the tests.
_SHAPE = "int h, int w, int window, int num_prefix, float dropout"


@torch.library.custom_op(
    "vitrail::local_attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor seed, {_SHAPE}) -> Tensor",
)
def _attend(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor, h: int, w: int, window: int, num_prefix: int, dropout: float
) -> Tensor:
    workspace = _Workspace(q, tiling_of((h, w), window, num_prefix), dropout, seed)
    out = empty_heads(q)
    with torch.autocast("cpu", enabled=False):
        for group in workspace.head_groups():
            for band in workspace.bands():
                queries = workspace.gather_queries("queries", q[group], band).mul_(workspace.scale)
                keys, values = (
                    workspace.gather_halos("keys", k[group], band),
                    workspace.gather_halos("values", v[group], band),
                )
                weights = workspace.weights(queries, keys, band)
                weights = _dropped(weights, workspace.dropout_factor(weights, group, band))
                workspace.scatter(torch.bmm(weights, values, out=queries), out[group], band)
            if num_prefix:
                weights = workspace.prefix_weights(q[group], k[group])
                weights = _dropped(weights, workspace.prefix_dropout_factor(weights, group))
                out[group][:, :num_prefix] = torch.bmm(weights, v[group])
    return out


@torch.library.custom_op(
    "vitrail::local_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor seed, {_SHAPE}) -> Tensor",
)
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor,
    h: int,
    w: int,
    window: int,
    num_prefix: int,
    dropout: float,
) -> Tensor:
    """Return the gradients of q, k and v, [3, B, K, N, d]."""
    workspace = _Workspace(q, tiling_of((h, w), window, num_prefix), dropout, seed)
    grads = empty_heads(q, 3)
    grad_q, grad_k, grad_v = grads.unbind(0)
    with torch.autocast("cpu", enabled=False):
        for group in workspace.head_groups():
            sums_k, sums_v = workspace.zero_sums("sums of keys", group), workspace.zero_sums("sums of values", group)
            for band in workspace.bands():
                queries = workspace.gather_queries("queries", q[group], band).mul_(workspace.scale)
                keys, values = (
                    workspace.gather_halos("keys", k[group], band),
                    workspace.gather_halos("values", v[group], band),
                )
                out_grads = workspace.gather_queries("out_grads", grad[group], band)
                weights = workspace.weights(queries, keys, band)
                factor = workspace.dropout_factor(weights, group, band)
                scores = torch.bmm(
                    out_grads, values.transpose(1, 2), out=workspace.buffer("scores", tuple(weights.shape))
                )
                scores = _softmax_backward(_dropped(scores, factor), weights)
                workspace.add_halos(
                    torch.bmm(_dropped(weights, factor).transpose(1, 2), out_grads, out=values), sums_v, band
                )
                workspace.scatter(torch.bmm(scores, keys, out=out_grads).mul_(workspace.scale), grad_q[group], band)
                workspace.add_halos(torch.bmm(scores.transpose(1, 2), queries, out=keys), sums_k, band)
            workspace.write_sums(sums_k, grad_k[group])
            workspace.write_sums(sums_v, grad_v[group])
            if num_prefix:
                queries, out_grads = q[group][:, :num_prefix] * workspace.scale, grad[group][:, :num_prefix]
                weights = workspace.prefix_weights(q[group], k[group])
                factor = workspace.prefix_dropout_factor(weights, group)
                scores = torch.bmm(out_grads, v[group].transpose(1, 2))
                scores = _softmax_backward(_dropped(scores, factor), weights)
                grad_q[group][:, :num_prefix] = torch.bmm(scores, k[group]).mul_(workspace.scale)
                grad_k[group].add_(torch.bmm(scores.transpose(1, 2), queries))
                grad_v[group].add_(torch.bmm(_dropped(weights, factor).transpose(1, 2), out_grads))
    return grads


class _Workspace:
    """The buffers of one call, and the copies between a sample's grid and the tiles of a group of heads in a band of rows.

    A band is a slice of tile rows; n heads × t tiles are one dimension, as `bmm` needs them.
    """

    def __init__(self, q: Tensor, tiling: Tiling, dropout: float, seed: Tensor) -> None:
        self.batch, self.heads, _, self.width = q.shape
        self.dtype, self.tiling, self.dropout = q.dtype, tiling, dropout
        self.scale = self.width**-0.5
        self.buffers: dict[str, Tensor] = {}
        self.rows, self.columns = (
            _kinds_along(*axis) for axis in zip(tiling.grid, tiling.tile, tiling.radius, strict=True)
        )
        self.bias = _bias(tiling, self.rows, self.columns, q.dtype)
        self.random = torch.Generator().manual_seed(int(seed))
        if dropout:  # a seed for every tile row, and one for the prefix
            units = (self.batch, self.heads, tiling.tiles[0] + 1)
            self.seeds = torch.randint(2**32, units, generator=self.random)
        image_bytes = tiling.num_scores * q.element_size()
        row_bytes = image_bytes // tiling.tiles[0]
        most = _CHUNK_BYTES * torch.get_num_threads()
        # Small inputs get small buffers.
        chunk_bytes = min(most, max(most // 4, self.batch * self.heads * image_bytes // 2))
        self.band_rows = max(1, min(tiling.tiles[0], chunk_bytes // row_bytes))
        self.heads_per_group = max(1, min(self.heads, chunk_bytes // image_bytes))

    def head_groups(self) -> Iterator[HeadGroup]:
        """Yield the groups of heads of every sample."""
        for sample in range(self.batch):
            for head in range(0, self.heads, self.heads_per_group):
                yield sample, slice(head, min(self.heads, head + self.heads_per_group))

    def bands(self) -> Iterator[slice]:
        """Yield the bands of tile rows of one group of heads."""
        for row in range(0, self.tiling.tiles[0], self.band_rows):
            yield slice(row, min(self.tiling.tiles[0], row + self.band_rows))

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a buffer by name, whose memory is used again for every chunk; it always holds finite numbers."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.zeros(size, dtype=dtype or self.dtype)
        return self.buffers[name][:size].view(shape)

    def gather_queries(self, name: str, x: Float[Tensor, "n N d"], band: slice) -> Float[Tensor, "nt queries d"]:
        """Return a copy of the tiles of a band, with zeros beyond the grid's edge."""
        tiling, n = self.tiling, x.shape[0]
        (h, w), (th, tw), (rows, columns) = tiling.grid, tiling.tile, (band.stop - band.start, tiling.tiles[1])
        start, stop = band.start * th, min(h, band.stop * th)
        source = x[:, tiling.num_prefix :].unflatten(1, (h, w))[:, start:stop]
        if stop - start < rows * th or w < columns * tw:
            edged = self.buffer("edged", (n, rows * th, columns * tw, self.width)).zero_()
            edged[:, : stop - start, :w] = source
            source = edged
        out = self.buffer(name, (n, rows, columns, th, tw, self.width))
        out.transpose(2, 3).copy_(source.unflatten(2, (columns, tw)).unflatten(1, (rows, th)))
        return out.view(-1, tiling.num_queries, self.width)

    def scatter(self, tiles: Float[Tensor, "nt queries d"], out: Float[Tensor, "n N d"], band: slice) -> None:
        """Copy the tiles of a band back to their tokens."""
        tiling = self.tiling
        (h, w), (th, tw), (rows, columns) = tiling.grid, tiling.tile, (band.stop - band.start, tiling.tiles[1])
        start, stop = band.start * th, min(h, band.stop * th)
        grid = out[:, tiling.num_prefix :].unflatten(1, (h, w))[:, start:stop]
        source = tiles.view(-1, rows, columns, th, tw, self.width).transpose(2, 3)
        if stop - start < rows * th or w < columns * tw:
            grid.copy_(source.reshape(-1, rows * th, columns * tw, self.width)[:, : stop - start, :w])
        else:
            grid.unflatten(2, (columns, tw)).unflatten(1, (rows, th)).copy_(source)

    def gather_halos(self, name: str, x: Float[Tensor, "n N d"], band: slice) -> Float[Tensor, "nt keys d"]:
        """Return a copy of the keys or values of every tile of a band: the prefix and the halo."""
        tiling, n = self.tiling, x.shape[0]
        (h, w), (th, tw), (rh, rw), (sh, sw) = tiling.grid, tiling.tile, tiling.radius, tiling.halo
        rows, columns = band.stop - band.start, tiling.tiles[1]
        above = band.start * th - rh  # first grid row of the band's first halo
        start, stop = max(0, above), min(h, band.stop * th + rh)
        spread = self.buffer("spread", (n, rows * th + 2 * rh, tiling.spread[1], self.width))
        for edge in (spread[:, : start - above], spread[:, stop - above :], spread[:, :, :rw], spread[:, :, rw + w :]):
            edge.zero_()
        grid = x[:, tiling.num_prefix :].unflatten(1, (h, w))
        spread[:, start - above : stop - above, rw : rw + w] = grid[:, start:stop]
        out = self.buffer(name, (n, rows, columns, tiling.num_keys, self.width))
        out[..., : tiling.num_prefix, :] = x[:, None, None, : tiling.num_prefix]
        rectangles = out[..., tiling.num_prefix :, :].unflatten(3, (sh, sw))
        rectangles.copy_(spread.unfold(1, sh, th).unfold(2, sw, tw).permute(0, 1, 2, 4, 5, 3))
        return out.view(-1, tiling.num_keys, self.width)

    def weights(
        self, queries: Float[Tensor, "nt queries d"], keys: Float[Tensor, "nt keys d"], band: slice
    ) -> Float[Tensor, "nt queries keys"]:
        """Return the attention weights of every tile of a band."""
        scores = self.buffer("weights", (queries.shape[0], queries.shape[1], keys.shape[1]))
        torch.bmm(queries, keys.transpose(1, 2), out=scores)
        rows = scores.view(-1, band.stop - band.start, self.tiling.tiles[1], *scores.shape[1:])
        for (row, down), (column, across) in itertools.product(
            self.rows.runs(band), self.columns.runs(slice(0, self.tiling.tiles[1]))
        ):
            rows[:, down, across].add_(self.bias[row, column])
        return torch.softmax(scores, dim=-1, out=scores)

    def prefix_weights(self, q: Float[Tensor, "n N d"], k: Float[Tensor, "n N d"]) -> Float[Tensor, "n prefix N"]:
        """Return the attention weights of the prefix tokens, which attend to all tokens."""
        return torch.bmm(q[:, : self.tiling.num_prefix] * self.scale, k.transpose(1, 2)).softmax(dim=-1)

    def dropout_factor(self, weights: Tensor, group: HeadGroup, band: slice) -> Tensor | None:
        """Draw the dropout factor of each weight of a band: 0 or 1 / (1 - dropout); None without dropout."""
        return self.draw_factors(weights, self.seeds[group][:, band]) if self.dropout else None

    def prefix_dropout_factor(self, weights: Tensor, group: HeadGroup) -> Tensor | None:
        """Draw the dropout factor of each weight of the prefix tokens; None without dropout."""
        return self.draw_factors(weights, self.seeds[group][:, -1:]) if self.dropout else None

    def draw_factors(self, weights: Tensor, seeds: Int64[Tensor, "n units"]) -> Tensor:
        """Draw each unit from its own seed: chunks depend on the threads, which may have changed by the backward pass."""
        factors = torch.empty_like(weights)
        for unit, seed in zip(factors.view(seeds.numel(), -1), seeds.flatten().tolist(), strict=True):
            unit.bernoulli_(1 - self.dropout, generator=self.random.manual_seed(seed))
        return factors.div_(1 - self.dropout)

    def zero_sums(self, name: str, group: HeadGroup) -> _Sums:
        """Return zeros for summing the gradients of the keys or values of one group of heads."""
        tiling, n = self.tiling, group[1].stop - group[1].start
        dtype = torch.float32 if self.dtype in (torch.bfloat16, torch.float16) else self.dtype
        # As many blocks of a tile's size as the last halo needs.
        blocks = [
            count - 1 + -(-halo // tile)
            for count, halo, tile in zip(tiling.tiles, tiling.halo, tiling.tile, strict=True)
        ]
        shape = (n, blocks[0], tiling.tile[0], blocks[1], tiling.tile[1], self.width)
        prefix = torch.zeros(n, tiling.num_prefix, self.width, dtype=dtype)
        return _Sums(self.buffer(name, shape, dtype).zero_(), prefix)

    def add_halos(self, tiles: Float[Tensor, "nt keys d"], sums: _Sums, band: slice) -> None:
        """Add the gradients of a band's keys or values to the sums, each halo as blocks of a tile's size one after another."""
        tiling, n = self.tiling, len(sums.prefix)
        (th, tw), (sh, sw), (rows, columns) = tiling.tile, tiling.halo, (band.stop - band.start, tiling.tiles[1])
        tiles = tiles.view(n, rows, columns, tiling.num_keys, self.width)
        if tiling.num_prefix:
            sums.prefix.add_(tiles[..., : tiling.num_prefix, :].sum((1, 2), dtype=sums.prefix.dtype))
        halos = tiles[..., tiling.num_prefix :, :].unflatten(3, (sh, sw)).transpose(2, 3)  # n rows sh columns sw d
        for down in range(0, sh, th):
            for across in range(0, sw, tw):
                piece = halos[:, :, down : down + th, :, across : across + tw]
                row, column = band.start + down // th, across // tw
                block = sums.patches[:, row : row + rows, :, column : column + columns]
                block[:, :, : piece.shape[2], :, : piece.shape[4]].add_(piece)

    def write_sums(self, sums: _Sums, grad: Float[Tensor, "n N d"]) -> None:
        """Write the sums of one group of heads into the gradient."""
        (h, w), (rh, rw), prefix = self.tiling.grid, self.tiling.radius, self.tiling.num_prefix
        grad[:, :prefix] = sums.prefix
        patches = sums.patches.flatten(3, 4).flatten(1, 2)
        grad[:, prefix:].unflatten(1, (h, w)).copy_(patches[:, rh : rh + h, rw : rw + w])


class _Sums(NamedTuple):
    """Partial sums of the gradients of keys or values: of the patches, in blocks of a tile's size, and of the prefix."""

    patches: Float[Tensor, "n rows th columns tw d"]
    prefix: Float[Tensor, "n prefix d"]


class _Kinds(NamedTuple):
    """The kinds of tile rows (or columns), by their mask: all but those at the grid's edges are of one kind.

    Attributes:
        firsts: index of the first row (or column) of each kind.
        kinds: the kind of every row (or column).
    """

    firsts: list[int]
    kinds: list[int]

    def runs(self, rows: slice) -> Iterator[tuple[int, slice]]:
        """Yield the runs of equal kind among some rows (or columns): the kind, and the slice of those rows."""
        for kind, group in groupby(range(rows.start, rows.stop), key=self.kinds.__getitem__):
            run = list(group)
            yield kind, slice(run[0] - rows.start, run[-1] + 1 - rows.start)


def _kinds_along(side: int, tile: int, radius: int) -> _Kinds:
    """Return the kinds along one side of the grid; a tile's mask depends on how far its halo exceeds either edge."""
    marks = [(min(start, radius), min(side - start, tile + radius)) for start in range(0, side, tile)]
    distinct = list(dict.fromkeys(marks))
    return _Kinds([marks.index(mark) for mark in distinct], [distinct.index(mark) for mark in marks])


# One grid's bias takes 0.1 to some MB, 38 MB with window 31 on 224×224.
_BIASES = TensorCache(limit_bytes=64 * 2**20)


def _bias(
    tiling: Tiling, rows: _Kinds, columns: _Kinds, dtype: torch.dtype
) -> Float[Tensor, "rows columns queries keys"]:
    """Return the bias that is added to the scores of each kind of tile."""
    firsts = [torch.tensor(kinds.firsts, device="cpu") for kinds in (rows, columns)]
    return _BIASES.get((tiling, dtype), lambda: tile_bias(tiling, firsts[0], firsts[1], dtype))


def _dropped(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of the scores, written over `grad`."""
    return torch.ops.aten._softmax_backward_data.out(grad, weights, -1, grad.dtype, grad_input=grad)


_attend.register_fake(lambda q, *_: empty_heads(q))
_attend_backward.register_fake(lambda grad, q, *_: empty_heads(q, 3))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.shape = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, *ctx.shape)
    return *grads.unbind(0), None, None, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_save_for_backward)
