"""Images of mixed sizes: packed into one row, against one after the other, and against padding to the largest.

python benchmarks/packing.py [--count 32] [--rounds 5]

Inference of a ViT-Ti/16 with random weights on images whose aspect ratios are drawn from 1:2 to 2:1 at about 224² pixels,
and whose area is that or half of it. All ways give an image's own tokens the same work; padding adds tokens (and would
change the logits without a mask, so it is a lower bound of what a padded batch costs). Prints images/s, and the ratio of
packing to each, paired by round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch

from vitrail.device import supports_bf16
from vitrail.machine import processor_name
from vitrail.models.variants import variant_config
from vitrail.models.vit import ViT


def main() -> None:
    """Time the three ways in turn, round by round, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="ti16")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = ViT(variant_config(args.model)).eval()
    images = [torch.randn(3, *size) for size in sizes(args.count)]
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    padded = torch.zeros(args.count, 3, height, width)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: model.forward_packed(images),
        "one by one": lambda: [model(image[None]) for image in images],
        "padded": lambda: model(padded),
    }
    distinct = len({image.shape for image in images})
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.model}")
    print(f"{args.count} images of {distinct} sizes, padded to {height}×{width}")
    for bf16 in (False, True) if supports_bf16(torch.device("cpu")) else (False,):
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            for number in range(args.rounds + 1):  # the first warms up
                for name, way in ways.items():
                    started = time.perf_counter()
                    way()
                    if number:
                        speeds[name].append(args.count / (time.perf_counter() - started))
        for name, values in speeds.items():
            ratios = [ours / theirs for ours, theirs in zip(speeds["packed"], values, strict=True)]
            print(
                f"{'bf16' if bf16 else 'fp32'} {name:<11}{statistics.median(values):6.1f} images/s   packed/{name}: "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, n = {args.rounds})"
            )


def sizes(count: int) -> list[tuple[int, int]]:
    """Return pairs of height and width, multiples of 16 pixels."""
    pairs = []
    for aspect, area in zip((2 * torch.rand(count) - 1).exp2(), 1 - torch.rand(count).round() / 2, strict=True):
        side = 224 * float(area) ** 0.5
        pairs.append((round(side * float(aspect) ** 0.5 / 16) * 16, round(side / float(aspect) ** 0.5 / 16) * 16))
    return pairs


if __name__ == "__main__":
    main()
