"""Local attention on this machine: time and peak memory against the grid, for every way to compute it.

One image, 3 heads of 64, window 7 or other, on grids of 14² to 112² patches, without a class token unless `--prefix` says so:

- `ours`: Vitrail's default kernel (`vitrail/kernels/registry.py`): tiles, or a dense kernel on small grids;
- `masked`: the article's way, PyTorch's fused attention with a dense N×N mask;
- `fused`: the same kernel without a mask, attention of all to all;
- `flex`: compiled FlexAttention, forward alone (`--flex`); on CPUs its backward raises NotImplementedError.

In each round every way is timed once. Prints medians, and the ratio of each way to `ours`, paired by round, with its
spread. `--memory` measures instead by what the peak of a process's memory rises, with q, k, v, the mask, the output and the
gradients, each way in a process of its own (Linux).

    python benchmarks/local_attention.py [--rounds 5] [--grids 14 28 56 112] [--windows 7] [--ways ours masked fused] [--flex]
        [--prefix 0] [--out FILE.json]
    python benchmarks/local_attention.py --memory [--prefix 0]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.kernels.registry import LOCAL_KERNELS, Case, default_kernel
from vitrail.kernels.window import window_mask
from vitrail.machine import processor_name

HEADS, WIDTH = 3, 64


def main() -> None:
    """Measure time, or memory with `--memory`, of every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grids", type=int, nargs="+", default=[14, 28, 56, 112])
    parser.add_argument("--windows", type=int, nargs="+", default=[7])
    parser.add_argument(
        "--prefix", type=int, default=0, help="class token and registers, which all see and which see all"
    )
    parser.add_argument("--ways", nargs="+", default=["ours", "masked", "fused"], help="ours first")
    parser.add_argument("--flex", action="store_true", help="compiled FlexAttention too; needs a C++ compiler")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--out", type=Path, help="add the figures to a JSON file")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak_bytes(args.one[0], getattr(torch, args.one[1]), *map(int, args.one[2:])))
        return
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; 1 image, {HEADS} heads of "
        f"{WIDTH}, {args.prefix} prefix tokens" + ("" if args.memory else f", n = {args.rounds} rounds")
    )
    rows: list[dict[str, Any]] = []
    for window in args.windows:
        for dtype in (torch.float32, torch.bfloat16):
            if args.memory:
                rows += compare_memory(dtype, args.grids, window, args.prefix)
                continue
            for training in (True, False):
                for grid in args.grids:
                    ways = [*args.ways, *["flex"] * (args.flex and not training)]
                    rows.append(compare_time(dtype, training, grid, window, args.prefix, args.rounds, ways))
    if args.out:
        before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        args.out.write_text(json.dumps(before + rows, indent=1) + "\n", encoding="utf-8")


def build(
    way: str, dtype: torch.dtype, training: bool, grid: int, window: int, prefix: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return one way to compute local attention (`fused`: global attention) of one shape."""
    tokens = prefix + grid * grid
    if way == "ours":
        case = Case("cpu", str(dtype)[6:], training, False, tokens, WIDTH, (grid, grid), window)
        kernel = LOCAL_KERNELS[default_kernel(case)]
        return lambda q, k, v: kernel(q, k, v, (grid, grid), window, prefix)
    if way == "masked":
        mask = torch.zeros(tokens, tokens, dtype=dtype).masked_fill_(
            ~window_mask((grid, grid), window, prefix), -math.inf
        )
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if way == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            i, j = i - prefix, j - prefix
            seen = ((i // grid - j // grid).abs() <= window // 2) & ((i % grid - j % grid).abs() <= window // 2)
            return seen | (i < 0) | (j < 0)

        blocks = create_block_mask(near, None, None, tokens, tokens, device="cpu")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks)  # pyright: ignore[reportReturnType]
    return F.scaled_dot_product_attention


def tensors(dtype: torch.dtype, training: bool, grid: int, prefix: int = 0) -> tuple[Tensor, ...]:
    """Return queries, keys and values as the qkv projection leaves them, side by side in memory."""
    packed = torch.randn(1, prefix + grid * grid, 3, HEADS, WIDTH, dtype=dtype)
    return tuple(part.transpose(1, 2).detach().requires_grad_(training) for part in packed.unbind(2))


def run_once(way: Callable[..., Tensor], qkv: tuple[Tensor, ...], training: bool) -> None:
    """Compute the output, and the gradients where training."""
    with torch.set_grad_enabled(training):
        out = way(*qkv)
        if training:
            torch.autograd.grad(out, qkv, torch.ones_like(out))


def compare_time(
    dtype: torch.dtype, training: bool, grid: int, window: int, prefix: int, rounds: int, names: list[str]
) -> dict[str, Any]:
    """Time the ways in turn, round by round, and print medians and ratios."""
    qkv = tensors(dtype, training, grid, prefix)
    ways = {name: build(name, dtype, training, grid, window, prefix) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, way in ways.items():
            started = time.perf_counter()
            run_once(way, qkv, training)
            if number:
                taken[name].append(1000 * (time.perf_counter() - started))
    work = "forward + backward" if training else "forward"
    line = f"{str(dtype)[6:]:<9}{work:<19}window {window:<3}{grid:>3}²  ours {statistics.median(taken['ours']):8.1f} ms"
    row: dict[str, Any] = {
        "dtype": str(dtype)[6:],
        "work": work,
        "window": window,
        "grid": grid,
        "prefix": prefix,
        "ms": {},
        "ratio": {},
    }
    for name, times in taken.items():
        ratios = [theirs / ours for theirs, ours in zip(times, taken["ours"], strict=True)]
        row["ms"][name] = round(statistics.median(times), 3)
        row["ratio"][name] = [round(value, 2) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        if name != "ours":
            middle, least, most = row["ratio"][name]
            line += f"   {name} {statistics.median(times):8.1f} ms, {middle:.2f} times ({least:.2f} to {most:.2f})"
    print(line, flush=True)
    return row


def compare_memory(dtype: torch.dtype, grids: list[int], window: int, prefix: int) -> list[dict[str, Any]]:
    """Print each way's peak of memory for every grid, and how ours grows."""
    rows = []
    for grid in grids:
        peaks = {}
        for way in ("ours", "masked", "fused"):
            command = [sys.executable, __file__, "--one", way, str(dtype)[6:], *map(str, (grid, window, prefix))]
            done = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
            peaks[way] = statistics.median(int(text) for text in done) / 1e6
        rows.append({"dtype": str(dtype)[6:], "window": window, "grid": grid, "prefix": prefix, "mb": peaks})
        figures = "   ".join(f"{way} {peak:8.1f} MB" for way, peak in peaks.items())
        print(f"{str(dtype)[6:]:<9}forward + backward  window {window:<3}{grid:>3}²  {figures}", flush=True)
    for one, two in itertools.pairwise(rows):
        power = math.log(two["mb"]["ours"] / one["mb"]["ours"]) / math.log((two["grid"] / one["grid"]) ** 2)
        print(f"{str(dtype)[6:]:<9}ours from {one['grid']}² to {two['grid']}²: memory grows as N to the {power:.2f}")
    return rows


def peak_bytes(way: str, dtype: torch.dtype, grid: int, window: int, prefix: int) -> int:
    """Return by how much one training step of one way lifts the process's peak of resident memory."""
    # Loads libraries and starts threads; small, so that it leaves nothing behind.
    run_once(build("masked", dtype, True, 8, 3, 0), tensors(dtype, True, 8), True)
    run_once(lambda q, k, v: LOCAL_KERNELS["tiles"](q, k, v, (9, 9), 3, 0), tensors(dtype, True, 9), True)
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    run_once(build(way, dtype, True, grid, window, prefix), tensors(dtype, True, grid, prefix), True)
    return memory_status("VmHWM") - before


def memory_status(field: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}: memory is measured on Linux only")


if __name__ == "__main__":
    main()
