"""A whole model at large images: a training step with local attention against one with global attention.

ViT-S/16 at 896 px (56×56 patches), window 7, one image: forward, cross-entropy, backward, AdamW step.

- `local`: tiles, Vitrail's default kernel;
- `masked`: the article's way, the same model by PyTorch's fused attention under a dense N×N mask;
- `global`: attention of all to all, by the kernel that `vitrail.kernels.autotune` measures to be fastest;
- `matmul`: the same as matmul-softmax-matmul, which keeps N×N weights a head and block.

In each round every way is timed once. Prints seconds, and the ratio of each to `local`, paired by round, with its spread.
`--memory` measures instead by what the peak of a process's memory rises in one step, each in a process of its own (Linux).

    python -m benchmarks.local_model [--rounds 5] [--model s16] [--image-size 896] [--window 7]
    python -m benchmarks.local_model --memory
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.local_attention import memory_status
from vitrail.kernels.autotune import fastest_kernels
from vitrail.kernels.registry import Kernels
from vitrail.machine import processor_name
from vitrail.models.kernel_choice import attention_cases
from vitrail.models.variants import variant_config
from vitrail.models.vit import ViT

WAYS = ("local", "masked", "global", "matmul")


def main() -> None:
    """Measure both number formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="s16")
    parser.add_argument("--image-size", type=int, default=896)
    parser.add_argument("--window", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak_bytes(args.one[0], args.one[1], args))
        return
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.model} at "
        f"{args.image_size} px, window {args.window}, 1 image, training step"
        + ("" if args.memory else f", n = {args.rounds} rounds")
    )
    for dtype in ("float32", "bfloat16"):
        compare_memory(dtype, args) if args.memory else compare_time(dtype, args)


def build(way: str, dtype: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step of one way."""
    torch.manual_seed(0)
    local = {} if way in ("global", "matmul") else {"attention": "local", "window": args.window}
    config = variant_config(args.model, image_size=args.image_size, **local)
    model = ViT(config).train()
    if way == "masked":
        model.kernels = Kernels(local_attention="fused")
    elif way == "matmul":
        model.kernels = Kernels(global_attention="matmul")
    else:
        cases = attention_cases(config, (config.image_size, config.patch_size), "cpu", dtype, training=True)
        model.kernels = fastest_kernels(cases, cache=None)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, targets = torch.rand(1, 3, config.image_size, config.image_size), torch.tensor([3])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare_time(dtype: str, args: argparse.Namespace) -> None:
    """Time the ways in turn, round by round, and print medians and ratios."""
    steps = {way: build(way, dtype, args) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):  # the first warms up
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                taken[way].append(time.perf_counter() - started)
    for way, times in taken.items():
        ratios = [theirs / ours for theirs, ours in zip(times, taken["local"], strict=True)]
        print(
            f"{dtype:<9}{way:<7}{statistics.median(times):7.2f} s   {statistics.median(ratios):5.2f} times local "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def compare_memory(dtype: str, args: argparse.Namespace) -> None:
    """Print each way's peak of memory in one step."""
    peaks = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.local_model", "--one", way, dtype, "--model", args.model]
        command += ["--image-size", str(args.image_size), "--window", str(args.window)]
        done = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        peaks[way] = statistics.median(int(text) for text in done) / 1e6
        print(f"{dtype:<9}{way:<7}{peaks[way]:8.0f} MB   {peaks[way] / peaks['local']:5.2f} times local", flush=True)


def peak_bytes(way: str, dtype: str, args: argparse.Namespace) -> int:
    """Return by how much a step lifts the process's peak of resident memory above that of the model itself."""
    step = build(way, dtype, args)
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    step()
    return memory_status("VmHWM") - before


if __name__ == "__main__":
    main()
