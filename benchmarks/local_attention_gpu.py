"""The ways to compute local attention (`vitrail/kernels/`) on this CUDA device.

PyTorch's dense attention with a mask, FlexAttention as one would write it oneself, our FlexAttention, our Triton kernels,
the compiled tiled form, and NATTEN where it is installed; forward, and forward + backward, in turn, round by round, by
CUDA events. Prints milliseconds (median over rounds), the ratios to the first two, paired by round, with their spread,
the peak memory of a call beyond its inputs, and the largest difference from the first. NATTEN moves windows inside at
the border, so its result is another one; it is timed with `--prefix 0` only.

    python benchmarks/local_attention_gpu.py [--rounds 7] [--windows 7 13] [--grids 14 28 56 112] [--prefix 1]
        [--sizes 64 4 2]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vitrail.kernels import triton_local
from vitrail.kernels.flex import attend_flex
from vitrail.kernels.tiling import attend_tiles_plain
from vitrail.kernels.triton_local import Sizes, attend_triton

HEADS, WIDTH = 6, 64  # ViT-S
CALLS = 10  # between two events, whose own cost is microseconds
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure every grid, window and number format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, nargs="+", default=[7, 13])
    parser.add_argument("--grids", type=int, nargs="+", default=[14, 28, 56, 112])
    parser.add_argument("--prefix", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs=3, help="of the Triton kernels: keys at a time, warps, stages")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device here: nothing to measure.")
        return
    if arguments.sizes:
        triton_local.choose_sizes = lambda dtype, head_dim: Sizes(*arguments.sizes)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(f"{torch.cuda.get_device_name()}, {versions}, n = {arguments.rounds} rounds of {CALLS} calls")
    for dtype, side, window in product((torch.bfloat16, torch.float32), arguments.grids, arguments.windows):
        shape = ((side, side), window, arguments.prefix)
        ways = dict(ways_to_compute(*shape))
        batch = 8 if side < 112 else 2
        for training in (False, True):
            torch._dynamo.reset()  # its limit of variants is one program's, not one shape's
            print(
                f"\n{str(dtype)[6:]}  {side}×{side}, window {window}, {batch} images, {HEADS} heads of {WIDTH}, ",
                end="",
            )
            print("forward + backward" if training else "forward")
            measure(ways, dtype, batch, arguments.prefix + side**2, training, arguments.rounds)


def ways_to_compute(grid: tuple[int, int], window: int, num_prefix: int) -> Iterator[tuple[str, Way]]:
    """Yield the ways by name, the two to compare with first; says which are missing."""
    index = torch.arange(num_prefix + grid[0] * grid[1], device="cuda")

    def sees(b: object, h: object, query: Tensor, key: Tensor) -> Tensor:
        i, j = query - num_prefix, key - num_prefix
        rows, columns = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
        return (i < 0) | (j < 0) | ((rows.abs() <= window // 2) & (columns.abs() <= window // 2))

    mask = torch.cat([sees(None, None, part[:, None], index) for part in index.split(1024)])
    yield "SDPA + mask", partial(F.scaled_dot_product_attention, attn_mask=mask)
    blocks = create_block_mask(sees, None, None, len(index), len(index), device="cuda")
    yield "FlexAttention, plain", partial(torch.compile(flex_attention), block_mask=blocks)
    shape = {"grid": grid, "window": window, "num_prefix": num_prefix}
    yield "vitrail, flex", partial(attend_flex, **shape)
    yield "vitrail, Triton", partial(attend_triton, **shape)
    yield "vitrail, tiles", torch.compile(partial(attend_tiles_plain, **shape))
    if find_spec("natten") and not num_prefix and 1 < window <= min(grid):
        yield "NATTEN, moved windows", partial(attend_natten, grid=grid, window=window)


def attend_natten(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Return NATTEN's neighbourhood attention, whose windows are moved inside at the border."""
    from natten import na2d

    q, k, v = (x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v))
    return na2d(q, k, v, kernel_size=window).flatten(1, 2).transpose(1, 2)


def measure(ways: dict[str, Way], dtype: torch.dtype, batch: int, tokens: int, training: bool, rounds: int) -> None:
    """Time the ways in turn, round by round, and print medians and ratios."""
    packed = torch.randn(batch, tokens, 3, HEADS, WIDTH, dtype=dtype, device="cuda")  # as the qkv projection leaves it
    inputs = [part.transpose(1, 2).detach().requires_grad_(training) for part in packed.unbind(2)]
    grad = torch.randn(batch, tokens, HEADS, WIDTH, dtype=dtype, device="cuda").transpose(1, 2)
    taken: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    expected: list[Tensor] = []
    for name, way in ways.items():
        try:
            results, peak = try_once(way, inputs, grad, training)
        except Exception as error:  # one way that cannot do this shape must not end the others' measurement
            print(f"  {name:<22} failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            continue
        expected = expected or results
        differs = max((one - other).abs().max().item() for one, other in zip(results, expected, strict=True))
        taken[name], notes[name] = [], f"peak {peak / 2**20:7.0f} MiB  differs by {differs:.1e}"
    for name in list(taken) * rounds:
        taken[name].append(time_calls(ways[name], inputs, grad, training))
    for name, times in taken.items():
        ratios = "".join(compare(times, taken[other], other) for other in list(ways)[:2] if other in taken)
        print(f"  {name:<22} {statistics.median(times):8.3f} ms  {ratios}{notes[name]}")


def try_once(way: Way, inputs: list[Tensor], grad: Tensor, training: bool) -> tuple[list[Tensor], int]:
    """Compile and warm up; return the result with its gradients, and the peak memory of a call in bytes."""
    for _ in range(3):
        call(way, inputs, grad, training)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call(way, inputs, grad, training)
    torch.cuda.synchronize()
    return [x.detach().float() for x in results], torch.cuda.max_memory_allocated() - before


def call(way: Way, inputs: list[Tensor], grad: Tensor, training: bool) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(training):
        out = way(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad)) if training else (out,)


def time_calls(way: Way, inputs: list[Tensor], grad: Tensor, training: bool) -> float:
    """Return the milliseconds of one call."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(CALLS):
        call(way, inputs, grad, training)
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / CALLS


def compare(times: list[float], others: list[float], other: str) -> str:
    ratios = [mine / theirs for mine, theirs in zip(times, others, strict=True)]
    return f"/ {other} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "


if __name__ == "__main__":
    main()
