"""Sides of a tile and sizes of a chunk for local attention on the CPU (`vitrail/kernels/tiles.py`), on this machine.

Forward + backward of one image, 3 heads of 64, window 7: every tile with the chunk as it is, then every chunk with the
tile as it is. In each round all are timed once; prints milliseconds, the median with minimum and maximum.

    python -m benchmarks.tile_sizes [--rounds 7] [--grids 28 56 112] [--window 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from benchmarks.local_attention import HEADS, WIDTH, run_once, tensors
from vitrail.kernels import tiles
from vitrail.kernels.tiling import Tiling, tiling_of
from vitrail.machine import processor_name

TILES = ((4, 4), (4, 7), (7, 4), (4, 8), (6, 6), (7, 7), (8, 8), (14, 14))
CHUNKS_KB = (256, 512, 768, 1024, 1536, 4096)  # a thread


def main() -> None:
    """Measure both number formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--grids", type=int, nargs="+", default=[28, 56, 112])
    parser.add_argument("--window", type=int, default=7)
    args = parser.parse_args()
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; 1 image, {HEADS} heads of "
        f"{WIDTH}, window {args.window}, n = {args.rounds} rounds"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for grid in args.grids:
            own = tiling_of((grid, grid), args.window, 0)
            print(f"{str(dtype)[6:]} {grid}², tile {own.tile}, chunk {tiles._CHUNK_BYTES // 1024} KB")
            compare(
                "tile", {str(tile): (replace(own, tile=tile), tiles._CHUNK_BYTES) for tile in TILES}, dtype, grid, args
            )
            compare("chunk", {f"{size} KB": (own, size * 1024) for size in CHUNKS_KB}, dtype, grid, args)


def compare(
    what: str, ways: dict[str, tuple[Tiling, int]], dtype: torch.dtype, grid: int, args: argparse.Namespace
) -> None:
    """Time the ways in turn, round by round, and print medians and ranges."""
    qkv = tensors(dtype, True, grid)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    before = tiles._CHUNK_BYTES, tiles.tiling_of
    for number in range(args.rounds + 1):  # the first warms up
        for name, (tiling, chunk) in ways.items():
            tiles._CHUNK_BYTES, tiles.tiling_of = chunk, lambda *_, tiling=tiling: tiling  # pyright: ignore[reportAttributeAccessIssue]
            started = time.perf_counter()
            run_once(lambda q, k, v: tiles.attend_tiles(q, k, v, (grid, grid), args.window, 0), qkv, True)
            if number:
                taken[name].append(1000 * (time.perf_counter() - started))
    tiles._CHUNK_BYTES, tiles.tiling_of = before
    for name, times in taken.items():
        print(
            f"  {what} {name:<9}{statistics.median(times):7.1f} ms ({min(times):.1f} to {max(times):.1f})", flush=True
        )


if __name__ == "__main__":
    main()
