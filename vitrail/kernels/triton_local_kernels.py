"""The Triton kernels of local attention; `triton_local.py` launches them. Importing this file imports Triton.

The grid of patches is cut into tiles of TILE_H × TILE_W, and the prefix into runs of as many tokens, so that each token
is in exactly one tile; a program works for one tile of one head of one image. The keys of a patch tile are its halo,
the rectangle of patches at most `radius` away from it, cut off at the border. The patches of the halo are numbered by
rows and loaded BLOCK at a time, so no lane is spent on patches outside the grid, and any window and any grid will do.

A prefix token attends to all tokens and all attend to it, which no single program could sum up quickly. Each program
therefore also computes what its own tile contributes to the prefix, and writes it to memory of its own; the launcher sums
these contributions in a fixed order. No kernel uses atomics: two runs give the same bits.

Exponentials are powers of two, which are one instruction: `scale` is log2(e) / √d.
"""

# Compile-time sizes are in capitals, as in all of Triton; pyright misreads its tensors and its range.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import triton
import triton.language as tl

PREFIX = tl.constexpr(16)  # prefix tokens in a block; tl.dot takes no fewer
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-(2**30))
LOWEST = tl.constexpr(-1.0e30)  # below any score, yet finite: LOWEST - LOWEST is 0 and not NaN


def _jit(kernel: Callable[..., Any]) -> Any:
    """Compile the unwrapped function: tests wrap all functions of the package to check their annotations."""
    return triton.jit(unwrap(kernel))


@_jit
def _program(heads, height, width, num_prefix, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Return the index of this program's tile, the number of tiles, its image and its head.

    Tiles vary fastest, so that programs running at once share their halos in the cache.
    """
    tiles = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W) + tl.cdiv(num_prefix, TILE_H * TILE_W)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    # 64 bits: offsets of a whole batch pass 2³¹, those within an image do not.
    return tile, tiles, (row // heads).to(tl.int64), (row % heads).to(tl.int64)


@_jit
def _own(tile, height, width, num_prefix, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Return the rows, columns, token numbers and validity of a tile's own tokens, and whether they are patches.

    Lanes outside the grid get a row that is near no other, so that no weight of theirs can overflow.
    """
    across = tl.cdiv(width, TILE_W)
    patch_tiles = tl.cdiv(height, TILE_H) * across
    is_patch = tile < patch_tiles
    slot = tl.arange(0, TILE_H * TILE_W)
    i = tile // across * TILE_H + slot // TILE_W
    j = tile % across * TILE_W + slot % TILE_W
    prefix = (tile - patch_tiles) * TILE_H * TILE_W + slot
    token = tl.where(is_patch, num_prefix + i * width + j, prefix)
    inside = tl.where(is_patch, (i < height) & (j < width), prefix < num_prefix)
    return tl.where(inside, i, FAR), j, token, inside, is_patch


@_jit
def _halo(tile, height, width, num_prefix, radius, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Return the first row, first column, columns and patches of a tile's halo; a prefix tile has none."""
    across = tl.cdiv(width, TILE_W)
    top = tile // across * TILE_H
    left = tile % across * TILE_W
    first_i = tl.maximum(top - radius, 0)
    first_j = tl.maximum(left - radius, 0)
    rows = tl.minimum(top + TILE_H + radius, height) - first_i
    cols = tl.minimum(left + TILE_W + radius, width) - first_j
    return first_i, first_j, cols, tl.where(top < height, rows * cols, 0)


@_jit
def _halo_block(start, first_i, first_j, cols, count, width, num_prefix, BLOCK: tl.constexpr):
    """Return the rows, columns, token numbers and validity of the BLOCK patches of a halo from `start` on."""
    slot = start + tl.arange(0, BLOCK)
    i = first_i + slot // cols
    j = first_j + slot % cols
    return i, j, num_prefix + i * width + j, slot < count


@_jit
def _near(i, j, other_i, other_j, inside, radius):
    """Return which of the pairs of patches are in one another's window; the relation is symmetric."""
    rows = tl.abs(i[:, None] - other_i[None, :]) <= radius
    cols = tl.abs(j[:, None] - other_j[None, :]) <= radius
    return rows & cols & inside[None, :]


@_jit
def _load(base, token, inside, stride, HEAD: tl.constexpr, D: tl.constexpr):
    """Return the rows of some tokens, with zeros for those outside and for the columns from HEAD to D."""
    c = tl.arange(0, D)
    return tl.load(base + token[:, None] * stride + c[None, :], mask=inside[:, None] & (c < HEAD)[None, :], other=0.0)


@_jit
def _store(base, token, inside, stride, rows, HEAD: tl.constexpr, D: tl.constexpr):
    c = tl.arange(0, D)
    mask = inside[:, None] & (c < HEAD)[None, :]
    tl.store(base + token[:, None] * stride + c[None, :], rows.to(base.dtype.element_ty), mask=mask)


@_jit
def _scores(queries, keys, seen):
    return tl.where(seen, tl.dot(queries, tl.trans(keys), input_precision="ieee"), -float("inf"))


@_jit
def _gradient(rows, columns, row_grads, column_grads, seen, log_sum, dots, scale):
    """Return the weights, and the scores' gradient, of queries as rows and keys as columns, or the other way round.

    Beside queries stand the gradients of their results, beside keys their values.
    """
    weights = tl.exp2(_scores(rows, columns, seen) * scale - log_sum)
    d_weights = tl.dot(row_grads, tl.trans(column_grads), input_precision="ieee")
    return weights, (weights * (d_weights - dots)).to(columns.dtype)


@_jit
def _softmax_step(queries, keys, values, seen, highest, total, acc, scale):
    """Add a block of keys to a running softmax (Milakov and Gimelshein 2018)."""
    scores = _scores(queries, keys, seen)
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    shrink = tl.exp2(highest - new)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(weights, 1), acc


@_jit
def forward(
    q, k, v, out, lse, prefix_out, prefix_lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    heads, height, width, num_prefix, radius, scale,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write `out` and `lse` of the tile's patches, and the same of the prefix's attention to this tile alone."""
    tile, tiles, b, head = _program(heads, height, width, num_prefix, TILE_H, TILE_W)
    i, j, token, inside, is_patch = _own(tile, height, width, num_prefix, TILE_H, TILE_W)
    tokens = num_prefix + height * width
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    queries = _load(q, token, inside, q_n, HEAD, D)
    highest = tl.full((TILE_H * TILE_W,), LOWEST, tl.float32)
    total = tl.zeros((TILE_H * TILE_W,), tl.float32)
    acc = tl.zeros((TILE_H * TILE_W, D), tl.float32)
    for start in tl.range(0, num_prefix, PREFIX, num_stages=1):
        prefix = start + tl.arange(0, PREFIX)
        keys = _load(k, prefix, prefix < num_prefix, k_n, HEAD, D)
        values = _load(v, prefix, prefix < num_prefix, v_n, HEAD, D)
        seen = (prefix < num_prefix)[None, :]
        highest, total, acc = _softmax_step(queries, keys, values, seen, highest, total, acc, scale)
    first_i, first_j, cols, count = _halo(tile, height, width, num_prefix, radius, TILE_H, TILE_W)
    for start in range(0, count, BLOCK):
        key_i, key_j, key, valid = _halo_block(start, first_i, first_j, cols, count, width, num_prefix, BLOCK)
        keys = _load(k, key, valid, k_n, HEAD, D)
        values = _load(v, key, valid, v_n, HEAD, D)
        seen = _near(i, j, key_i, key_j, valid, radius)
        highest, total, acc = _softmax_step(queries, keys, values, seen, highest, total, acc, scale)
    total = tl.where(total > 0, total, 1.0)  # a lane outside the grid may have seen no key
    out += (b * tokens * heads + head) * HEAD
    _store(out, token, inside & is_patch, heads * HEAD, acc / total[:, None], HEAD, D)
    lse += (b * heads + head) * tokens
    tl.store(lse + token, (highest + tl.log2(total)) * LN2, mask=inside & is_patch)

    partial = ((b * heads + head) * tiles + tile) * num_prefix
    for start in tl.range(0, num_prefix, PREFIX, num_stages=1):
        prefix = start + tl.arange(0, PREFIX)
        queries_p = _load(q, prefix, prefix < num_prefix, q_n, HEAD, D)
        keys = _load(k, token, inside, k_n, HEAD, D)
        values = _load(v, token, inside, v_n, HEAD, D)
        scores = _scores(queries_p, keys, inside[None, :])
        highest_p = tl.max(scores, 1) * scale
        weights = tl.exp2(scores * scale - highest_p[:, None])
        total_p = tl.sum(weights, 1)
        rows = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / total_p[:, None]
        _store(prefix_out + partial * HEAD, prefix, prefix < num_prefix, HEAD, rows, HEAD, D)
        tl.store(prefix_lse + partial + prefix, (highest_p + tl.log2(total_p)) * LN2, mask=prefix < num_prefix)


@_jit
def backward_queries(
    q, k, v, out, lse, grad, delta, dq, prefix_dk, prefix_dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, height, width, num_prefix, radius, scale,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write `dq` of the tile's patches, `delta` = grad · out of all its tokens, and their contribution to the gradients of prefix keys and values."""
    tile, tiles, b, head = _program(heads, height, width, num_prefix, TILE_H, TILE_W)
    i, j, token, inside, is_patch = _own(tile, height, width, num_prefix, TILE_H, TILE_W)
    tokens = num_prefix + height * width
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    queries = _load(q, token, inside, q_n, HEAD, D)
    grads = _load(grad + b * g_b + head * g_h, token, inside, g_n, HEAD, D)
    row = (b * heads + head) * tokens
    column = (b * tokens * heads + head) * HEAD
    outs = _load(out + column, token, inside, heads * HEAD, HEAD, D)
    dots = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row + token, dots, mask=inside)
    log_sum = tl.load(lse + row + token, mask=inside, other=0.0) * LOG2E
    acc = tl.zeros((TILE_H * TILE_W, D), tl.float32)

    partial = ((b * heads + head) * tiles + tile) * num_prefix * HEAD
    for start in tl.range(0, num_prefix, PREFIX, num_stages=1):
        prefix = start + tl.arange(0, PREFIX)
        keys = _load(k, prefix, prefix < num_prefix, k_n, HEAD, D)
        values = _load(v, prefix, prefix < num_prefix, v_n, HEAD, D)
        seen = (prefix < num_prefix)[None, :]
        weights, d_scores = _gradient(queries, keys, grads, values, seen, log_sum[:, None], dots[:, None], scale)
        acc = tl.dot(d_scores, keys, acc, input_precision="ieee")
        dk = tl.dot(tl.trans(d_scores), queries, input_precision="ieee") * (scale * LN2)
        dv = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision="ieee")
        _store(prefix_dk + partial, prefix, prefix < num_prefix, HEAD, dk, HEAD, D)
        _store(prefix_dv + partial, prefix, prefix < num_prefix, HEAD, dv, HEAD, D)
    first_i, first_j, cols, count = _halo(tile, height, width, num_prefix, radius, TILE_H, TILE_W)
    for start in range(0, count, BLOCK):
        key_i, key_j, key, valid = _halo_block(start, first_i, first_j, cols, count, width, num_prefix, BLOCK)
        keys = _load(k, key, valid, k_n, HEAD, D)
        values = _load(v, key, valid, v_n, HEAD, D)
        seen = _near(i, j, key_i, key_j, valid, radius)
        _, d_scores = _gradient(queries, keys, grads, values, seen, log_sum[:, None], dots[:, None], scale)
        acc = tl.dot(d_scores, keys, acc, input_precision="ieee")
    _store(dq + column, token, inside & is_patch, heads * HEAD, acc * (scale * LN2), HEAD, D)


@_jit
def backward_keys(
    q, k, v, lse, grad, delta, dk, dv, prefix_dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, height, width, num_prefix, radius, scale,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write `dk` and `dv` of the tile's patches, and their contribution to the gradients of prefix queries."""
    tile, tiles, b, head = _program(heads, height, width, num_prefix, TILE_H, TILE_W)
    i, j, token, inside, is_patch = _own(tile, height, width, num_prefix, TILE_H, TILE_W)
    tokens = num_prefix + height * width
    q += b * q_b + head * q_h
    grad += b * g_b + head * g_h
    lse += (b * heads + head) * tokens
    delta += (b * heads + head) * tokens
    keys = _load(k + b * k_b + head * k_h, token, inside, k_n, HEAD, D)
    values = _load(v + b * v_b + head * v_h, token, inside, v_n, HEAD, D)
    acc_k = tl.zeros((TILE_H * TILE_W, D), tl.float32)
    acc_v = tl.zeros((TILE_H * TILE_W, D), tl.float32)

    partial = ((b * heads + head) * tiles + tile) * num_prefix * HEAD
    for start in tl.range(0, num_prefix, PREFIX, num_stages=1):
        prefix = start + tl.arange(0, PREFIX)
        queries = _load(q, prefix, prefix < num_prefix, q_n, HEAD, D)
        grads = _load(grad, prefix, prefix < num_prefix, g_n, HEAD, D)
        log_sum = tl.load(lse + prefix, mask=prefix < num_prefix, other=0.0) * LOG2E
        dots = tl.load(delta + prefix, mask=prefix < num_prefix, other=0.0)
        seen = inside[:, None]
        weights, d_scores = _gradient(keys, queries, values, grads, seen, log_sum[None, :], dots[None, :], scale)
        acc_v = tl.dot(weights.to(grads.dtype), grads, acc_v, input_precision="ieee")
        acc_k = tl.dot(d_scores, queries, acc_k, input_precision="ieee")
        dq = tl.dot(tl.trans(d_scores), keys, input_precision="ieee") * (scale * LN2)
        _store(prefix_dq + partial, prefix, prefix < num_prefix, HEAD, dq, HEAD, D)
    first_i, first_j, cols, count = _halo(tile, height, width, num_prefix, radius, TILE_H, TILE_W)
    for start in range(0, count, BLOCK):
        query_i, query_j, query, valid = _halo_block(start, first_i, first_j, cols, count, width, num_prefix, BLOCK)
        queries = _load(q, query, valid, q_n, HEAD, D)
        grads = _load(grad, query, valid, g_n, HEAD, D)
        log_sum = tl.load(lse + query, mask=valid, other=0.0) * LOG2E
        dots = tl.load(delta + query, mask=valid, other=0.0)
        seen = _near(i, j, query_i, query_j, valid, radius)
        weights, d_scores = _gradient(keys, queries, values, grads, seen, log_sum[None, :], dots[None, :], scale)
        acc_v = tl.dot(weights.to(grads.dtype), grads, acc_v, input_precision="ieee")
        acc_k = tl.dot(d_scores, queries, acc_k, input_precision="ieee")
    column = (b * tokens * heads + head) * HEAD
    _store(dk + column, token, inside & is_patch, heads * HEAD, acc_k * (scale * LN2), HEAD, D)
    _store(dv + column, token, inside & is_patch, heads * HEAD, acc_v, HEAD, D)
