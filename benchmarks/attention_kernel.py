"""The two ways to compute dense attention (`vitrail/kernels/dense.py`), on this machine.

Forward, and forward + backward, of PyTorch's fused kernel and of matmul-softmax-matmul, in turn, round by round. Prints
milliseconds (median over rounds) and the ratio fused / matmul, paired by round, with its spread.

    python benchmarks/attention_kernel.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from vitrail.kernels.dense import attend_matmul
from vitrail.machine import processor_name

# Batch, heads, tokens, width of a head: what small images, ViT-Ti/16, ViT-B/16 and large grids compute.
SHAPES = ((128, 4, 65, 32), (128, 4, 257, 32), (32, 3, 197, 64), (8, 12, 197, 64), (4, 3, 785, 64), (1, 3, 1601, 64))


def main() -> None:
    """Measure every shape in both number formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, n = {rounds} rounds")
    for dtype in (torch.float32, torch.bfloat16):
        for training in (True, False):
            for shape in SHAPES:
                measure(dtype, training, shape, rounds)


def measure(dtype: torch.dtype, training: bool, shape: tuple[int, int, int, int], rounds: int) -> None:
    """Time the two ways in turn, round by round, and print medians and ratios."""
    batch, heads, tokens, width = shape
    packed = torch.randn(batch, tokens, 3, heads, width, dtype=dtype)  # laid out as the qkv projection leaves it
    q, k, v = (part.transpose(1, 2).detach().requires_grad_(training) for part in packed.unbind(2))
    ways = {"fused": F.scaled_dot_product_attention, "matmul": attend_matmul}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):  # the first two warm up
        for name, way in ways.items():
            started = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = way(q, k, v)
            if training:
                out.backward(torch.ones_like(out))
                q.grad = k.grad = v.grad = None
            if number >= 2:
                taken[name].append(1000 * (time.perf_counter() - started))
    ratios = [fused / matmul for fused, matmul in zip(taken["fused"], taken["matmul"], strict=True)]
    fused, matmul, ratio = (statistics.median(values) for values in (taken["fused"], taken["matmul"], ratios))
    kind = "forward + backward" if training else "forward"
    print(
        f"{str(dtype)[6:]:<9}{kind:<19}{shape!s:<20} fused {fused:7.1f} ms  matmul {matmul:7.1f} ms"
        f"  fused/matmul {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
