"""The attention kernels by name, the cases that each can compute, and the choice among them that a model carries.

Where no kernel was chosen a fixed rule decides, so that two runs of one configuration compute the same bits;
`vitrail.kernels.autotune` measures.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.kernels.dense import attend_fused, attend_matmul
from vitrail.kernels.tiles import attend_tiles
from vitrail.kernels.tiling import attend_tiles_plain, tiling_of
from vitrail.kernels.triton_local import usable
from vitrail.kernels.window import covers, window_bias


def _masked(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return local attention as dense attention under an N×N mask, for grids hardly larger than the window."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int, num_prefix: int, *, dropout: float = 0.0
    ) -> Tensor:
        return dense(q, k, v, bias=window_bias(grid, window, num_prefix, q.dtype, q.device), dropout=dropout)

    return attend


def _on_gpus(module: str, name: str) -> Callable[..., Tensor]:
    """Return a kernel for GPUs, imported when it is called: Triton is not on every platform."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int, num_prefix: int, *, dropout: float = 0.0
    ) -> Tensor:
        if dropout:
            raise ValueError(f"{name} drops no attention weights; set model.attention_dropout to 0, or take 'plain'")
        return getattr(import_module(f"vitrail.kernels.{module}"), name)(q, k, v, grid, window, num_prefix)

    return attend


GLOBAL_KERNELS: dict[str, Callable[..., Tensor]] = {"fused": attend_fused, "matmul": attend_matmul}
LOCAL_KERNELS: dict[str, Callable[..., Tensor]] = {
    "tiles": attend_tiles,
    "plain": attend_tiles_plain,
    "fused": _masked(attend_fused),
    "matmul": _masked(attend_matmul),
    "flex": _on_gpus("flex", "attend_flex"),
    "triton": _on_gpus("triton_local", "attend_triton"),
}

KERNELS = {"global": GLOBAL_KERNELS, "local": LOCAL_KERNELS}

# Not where other kernels get faster, but where N×N weights or masks get too large: 2 MB for each head and image.
_DENSE_TOKENS = 1024


class Case(NamedTuple):
    """All that decides which kernel is fastest on a machine: device, number format and shape, but not the batch size.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of queries, keys and values, as `float32`.
        training: whether gradients are computed.
        dropout: whether attention weights are dropped.
        tokens: N, the number of tokens with the prefix.
        width: d, the width of a head.
        grid: patch rows and columns of local attention; None: global.
        window: of local attention; 0: global.
    """

    device: str
    dtype: str
    training: bool
    dropout: bool
    tokens: int
    width: int
    grid: tuple[int, int] | None = None
    window: int = 0

    @property
    def kind(self) -> str:
        """The kind of attention, `global` or `local`."""
        return "local" if self.grid else "global"

    @property
    def num_prefix(self) -> int:
        """The number of prefix tokens of local attention; 0 for global."""
        return 0 if self.grid is None else self.tokens - self.grid[0] * self.grid[1]

    @property
    def key(self) -> str:
        """The case as text, the key in files."""
        mode = ("training" if self.training else "inference") + (" with dropout" if self.dropout else "")
        text = f"{self.device} {self.dtype} {mode}, {self.tokens} tokens of {self.width}"
        if self.grid is None:
            return text
        return f"{text}, window {self.window} on {self.grid[0]}x{self.grid[1]}"


def can_run(name: str, case: Case) -> bool:
    """Whether a kernel can compute a case at all."""
    if name == "tiles":
        return case.device == "cpu"
    if name in ("flex", "triton"):
        return case.device == "cuda" and not case.dropout and (name == "flex" or usable())
    return True


def candidate_kernels(case: Case) -> list[str]:
    """Return the kernels worth measuring for a case, the default kernel first.

    `flex` and `triton` are used only when given by name, until they have run on a GPU (benchmarks/local_attention_gpu.py).
    """
    dense = [
        name for name in ("fused", "matmul") if case.tokens <= _DENSE_TOKENS or (name == "fused" and not case.grid)
    ]
    first = default_kernel(case)
    names = dense
    if case.grid is not None and not (first == "fused" and case.tokens > _DENSE_TOKENS):
        names = [*dense, "tiles" if case.device == "cpu" else "plain"]
    return [first, *(name for name in names if name != first and can_run(name, case))]


def default_kernel(case: Case) -> str:
    """Return the kernel for a case without measurements, by a fixed rule."""
    dense = "fused"
    if case.device == "cpu" and case.dtype == "bfloat16" and case.tokens <= _DENSE_TOKENS:
        dense = "matmul"
    if case.grid is None:
        return dense
    large = tiling_of(case.grid, case.window, case.num_prefix).num_scores > case.tokens**2 / 2
    if case.device == "cpu":
        return dense if large and case.tokens <= _DENSE_TOKENS else "tiles"
    return dense if large else "plain"  # `plain` would hold that many scores of each head, and not one mask for all


@dataclass(frozen=True)
class Kernels:
    """The choice of kernels that a model carries.

    Attributes:
        chosen: a case's key → the kernel's name.
        global_attention: the kernel for all global attention, instead of those in `chosen`; empty: not given.
        local_attention: the same for local attention.
    """

    chosen: Mapping[str, str] = field(default_factory=dict)
    global_attention: str = ""
    local_attention: str = ""

    def attend(
        self,
        q: Float[Tensor, "B K N d"],
        k: Float[Tensor, "B K M d"],
        v: Float[Tensor, "B K M d"],
        *,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B K N d"]:
        """Return softmax(q kᵀ / √d) v."""
        name = self.global_attention
        if torch.compiler.is_exporting():
            name = "fused"
        if not name:
            case = _case(q, dropout)
            name = self.chosen.get(case.key) or default_kernel(case)
        return GLOBAL_KERNELS[name](q, k, v, dropout=dropout)

    def attend_local(
        self,
        q: Float[Tensor, "B K N d"],
        k: Float[Tensor, "B K N d"],
        v: Float[Tensor, "B K N d"],
        grid: tuple[int, int],
        window: int,
        *,
        dropout: float = 0.0,
    ) -> Float[Tensor, "B K N d"]:
        """Return local attention, where patches attend to their window and the prefix (`vitrail.kernels.window`)."""
        if covers(grid, window):
            return self.attend(q, k, v, dropout=dropout)
        # Plain integers, not symbols of torch.compile: each grid is compiled for itself, as it has its own tiling.
        grid, window = (operator.index(grid[0]), operator.index(grid[1])), operator.index(window)
        case = _case(q, dropout, grid, window)
        name = self.local_attention
        if torch.compiler.is_exporting():
            name = "plain"  # made of operations that every runtime has
        if not name:
            name = self.chosen.get(case.key) or default_kernel(case)
        return LOCAL_KERNELS[name](q, k, v, grid, window, case.num_prefix, dropout=dropout)


def _case(q: Tensor, dropout: float, grid: tuple[int, int] | None = None, window: int = 0) -> Case:
    training = torch.is_grad_enabled() and q.requires_grad
    dtype = str(q.dtype).removeprefix("torch.")
    return Case(
        q.device.type,
        dtype,
        training,
        dropout > 0,
        operator.index(q.shape[-2]),
        operator.index(q.shape[-1]),
        grid,
        window,
    )
