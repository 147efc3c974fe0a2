"""Local attention by Triton kernels, as operators that PyTorch can call, differentiate and compile around."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.kernels.dense import empty_heads
from vitrail.kernels.forward_mode import refuse_forward_mode

_TILE = 8  # side of a tile of patches; 64 queries fill the matrix units of four warps

# Schemas are written out: PyTorch reads annotations where a function was wrapped, and our tests wrap all of them.
_SHAPE = "SymInt height, SymInt width, SymInt window, SymInt num_prefix"


def attend_triton(
    q: Float[Tensor, "B K N d"],
    k: Float[Tensor, "B K N d"],
    v: Float[Tensor, "B K N d"],
    grid: tuple[int, int],
    window: int,
    num_prefix: int,
) -> Float[Tensor, "B K N d"]:
    """Return local attention: a patch attends to the patches at most `window // 2` rows and columns away and the prefix.

    No N×N tensor is made: memory is that of q, k, v and the result. Sums are computed in float32 and in one order, so that
    two runs give the same bits, backward too. Products are in the inputs' number format, for float32 without TF32.

    Args:
        q: Queries; prefix tokens first, which attend to everything, then the patches of the grid by rows. Any strides.
        k: Keys, of q's dtype.
        v: Values, of q's dtype.
        grid: Rows and columns of patches.
        window: Side of the window, odd; cut off at the grid's border. May exceed the grid.
        num_prefix: Class token and registers before the patches.

    Source: FlashAttention-2, Dao 2023 (arXiv:2307.08691), over the neighbourhoods of Hassani et al. 2023
    (arXiv:2204.07143), which here are cut off at the border and not moved inside.
    """
    assert q.shape[2] == num_prefix + grid[0] * grid[1], (q.shape, grid, num_prefix)
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    refuse_forward_mode("triton", q, k, v)
    return _forward(q, k, v, *grid, window, num_prefix)[0]


def usable() -> bool:
    """Whether the kernels run on the current GPU: one of NVIDIA's from Ampere on, where Triton is installed."""
    return find_spec("triton") is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8,)


@dataclass(frozen=True)
class Sizes:
    """Compile-time sizes of the kernels: keys in a block, warps of a program, and pipeline stages of loads."""

    block: int
    num_warps: int
    num_stages: int


def choose_sizes(dtype: torch.dtype, head_dim: int) -> Sizes:
    """Return sizes with which ptxas reports no spilled registers on compute capability 9.0.

    A fixed rule and not a measurement while training, so that two runs of one configuration compute the same bits.
    """
    if dtype == torch.float32:  # without tensor units, a thread holds its rows of both factors
        return Sizes(block=16, num_warps=8, num_stages=1)
    return Sizes(block=64, num_warps=4 if head_dim <= 64 else 8, num_stages=2)


@torch.library.custom_op(
    "vitrail::local_attention_triton",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SHAPE}) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Return the result and the log-sum-exp of each query's scores [B, K, N]."""
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    launch = _Launch(q, height, width, window, num_prefix)
    out, lse = empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    prefix_out, prefix_lse = launch.partial_sums(q.shape[-1]), launch.partial_sums()
    launch("forward", (q, k, v, out, lse, prefix_out, prefix_lse), strides_of=(q, k, v))
    if num_prefix:
        lse[:, :, :num_prefix] = prefix_lse.logsumexp(2)
        out[:, :, :num_prefix] = (prefix_lse.softmax(2)[..., None] * prefix_out).sum(2)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "vitrail::local_attention_triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SHAPE}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    height: int,
    width: int,
    window: int,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; weights are recomputed from `lse`."""
    grad, q, k, v = (_with_dense_rows(x) for x in (grad, q, k, v))
    launch = _Launch(q, height, width, window, num_prefix)
    dq, dk, dv, delta = empty_heads(q), empty_heads(k), empty_heads(v), torch.empty_like(lse)
    prefix_dq, prefix_dk, prefix_dv = (launch.partial_sums(q.shape[-1]) for _ in range(3))
    pointers = (q, k, v, out, lse, grad, delta, dq, prefix_dk, prefix_dv)
    launch("backward_queries", pointers, strides_of=(q, k, v, grad))
    pointers = (q, k, v, lse, grad, delta, dk, dv, prefix_dq)
    launch("backward_keys", pointers, strides_of=(q, k, v, grad))
    if num_prefix:
        for gradient, partial in ((dq, prefix_dq), (dk, prefix_dk), (dv, prefix_dv)):
            gradient[:, :, :num_prefix] = partial.sum(2)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.shape = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.shape), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Launch:
    """The grid of programs, the arguments and the compile-time sizes that the three kernels share."""

    def __init__(self, q: Tensor, height: int, width: int, window: int, num_prefix: int) -> None:
        batch, heads, _, head_dim = q.shape
        # The last tiles are the prefix, with as many tokens as a tile of the grid has.
        tiles = -(-height // _TILE) * -(-width // _TILE) + -(-num_prefix // _TILE**2)
        self.q, self.programs = q, batch * heads * tiles
        self.partial_shape = (batch, heads, tiles, num_prefix)
        self.arguments = (heads, height, width, num_prefix, window // 2, math.log2(math.e) / math.sqrt(head_dim))
        sizes = choose_sizes(q.dtype, head_dim)
        self.compiled = {
            "TILE_H": _TILE,
            "TILE_W": _TILE,
            "BLOCK": sizes.block,
            "HEAD": head_dim,
            "D": max(16, 1 << (head_dim - 1).bit_length()),  # tl.dot takes powers of two from 16 on
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        }

    def partial_sums(self, *head_dim: int) -> Tensor:
        """Return an empty tensor for the contribution of each tile to the prefix."""
        return self.q.new_empty(*self.partial_shape, *head_dim, dtype=torch.float32)

    def __call__(self, kernel: str, pointers: tuple[Tensor, ...], *, strides_of: tuple[Tensor, ...]) -> None:
        from vitrail.kernels import triton_local_kernels  # Triton is not on every platform

        strides = [stride for x in strides_of for stride in x.stride()[:3]]
        with torch.cuda.device_of(self.q):  # Triton launches on the current device
            getattr(triton_local_kernels, kernel)[self.programs,](*pointers, *strides, *self.arguments, **self.compiled)


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
