"""Policies, erasing and mixing on a batch, against torchvision's transforms image by image: milliseconds a batch.

    python benchmarks/augmentation.py [--size 224] [--batch 64] [--rounds 7]

Ours and theirs in turn, each round with other random numbers, in one process. Both begin and end with what they would in a
training: ours with floats in 0..1 after crop and colour, theirs with 8-bit images, and both end with a batch of floats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import v2

from vitrail.config import AugmentConfig
from vitrail.data.augment.erasing import erase_
from vitrail.data.augment.mixup import mix_pairs_
from vitrail.data.augment.policies import apply_policy
from vitrail.data.augment.random_changes import draw_changes
from vitrail.machine import processor_name

POLICIES = {
    "randaugment": v2.RandAugment(),
    "trivialaugment": v2.TrivialAugmentWide(),
    "three_augment": v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(13, (0.1, 2.0))]),
}
CASES: dict[str, AugmentConfig] = {
    **{name: AugmentConfig(policy=name) for name in POLICIES},
    "erasing 0.25": AugmentConfig(erasing=0.25),
    "erasing 0.25, noise": AugmentConfig(erasing=0.25, erasing_fill="noise"),
    "mixup 0.8": AugmentConfig(mixup=0.8),
    "cutmix 1": AugmentConfig(cutmix=1.0),
}


def main() -> None:
    """Print median times and the median ratio of neighbouring runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(CASES), help="one case")
    args = parser.parse_args()
    pixels = photographs(args.batch, args.size)
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{processor_name()}, {versions}, batch {args.batch} of {args.size} px, n = {args.rounds}")
    print("ms a batch, median (minimum to maximum); the ratio is theirs / ours, round by round\n")
    for name, config in CASES.items() if args.only is None else [(args.only, CASES[args.only])]:
        ours = our_way(config, pixels.float() / 255)
        for kind, theirs in their_ways(name, pixels).items():
            ours(0), theirs(0)  # loads libraries
            times = np.asarray([[timed(way, number) for way in (ours, theirs)] for number in range(1, args.rounds + 1)])
            ratio = times[:, 1] / times[:, 0]
            print(
                f"{name:<20} ours {median_and_range(times[:, 0] * 1000)}  {kind} {median_and_range(times[:, 1] * 1000)}  ratio {median_and_range(ratio)}"
            )


def photographs(count: int, size: int) -> Tensor:
    """Return images with detail at several scales, uint8 [B, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(count, 3, side, side, generator=generator) for side in (4, 16, size)]
    grown = [torch.nn.functional.interpolate(layer, (size, size), mode="bilinear") for layer in layers]
    return ((0.5 * grown[0] + 0.3 * grown[1] + 0.2 * grown[2]) * 255).to(torch.uint8)


def our_way(config: AugmentConfig, images: Tensor) -> Callable[[int], Tensor]:
    """Return Vitrail's way to change a batch, as a function of the round's number."""
    count = len(images)
    targets, indices = torch.arange(count) % 10, np.arange(count)

    def change(number: int) -> Tensor:
        draws = draw_changes(0, np.full(count, number), indices)
        # In place, as on a training's own batch: where nothing else makes a new one, a copy stands for it.
        changed = apply_policy(images, config, draws) if config.policy != "none" else images.clone()
        changed = erase_(changed, config, draws)
        return mix_pairs_(changed, targets, indices, config, draws)[0]

    return change


def their_ways(name: str, pixels: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """Return torchvision's ways to do the same, as functions of the round's number."""
    floats, targets = pixels.float() / 255, torch.arange(len(pixels)) % 10
    if name in POLICIES:
        files = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
        policy, ending = POLICIES[name], v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        return {
            "torchvision, tensors": lambda number: seeded(
                number, lambda: batch(ending(policy(image)) for image in pixels)
            ),
            "torchvision, Pillow": lambda number: seeded(
                number, lambda: batch(ending(policy(image)) for image in files)
            ),
        }
    if name.startswith("erasing"):
        change = v2.RandomErasing(0.25, value="random" if "noise" in name else 0)  # pyright: ignore[reportArgumentType]
        return {"torchvision": lambda number: seeded(number, lambda: batch(change(image) for image in floats))}
    mix = v2.MixUp(alpha=0.8, num_classes=10) if name.startswith("mixup") else v2.CutMix(alpha=1.0, num_classes=10)
    return {"torchvision, one draw a batch": lambda number: seeded(number, lambda: mix(floats, targets)[0])}


def batch(images: object) -> Tensor:
    """Stack images into one tensor."""
    return torch.stack(list(images))  # pyright: ignore[reportArgumentType]


def seeded(number: int, do: Callable[[], Tensor]) -> Tensor:
    """Return what `do` returns, computed with the round's random numbers."""
    torch.manual_seed(number)
    return do()


def timed(do: Callable[[int], Tensor], number: int) -> float:
    """Return the seconds that a round takes."""
    started = time.perf_counter()
    do(number)
    return time.perf_counter() - started


def median_and_range(values: np.ndarray) -> str:
    """Return the median, the minimum and the maximum as text."""
    return f"{statistics.median(values.tolist()):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
