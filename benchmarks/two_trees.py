"""Two versions of Vitrail, one against the other: does a change of structure cost time?

    python benchmarks/two_trees.py OLD NEW [--rounds 7]

OLD and NEW are checkouts. Everything goes through the public command line, alternating, on images that the script makes:

- `help`: seconds of `vitrail --help`, and of `vitrail train --help`;
- `first step`: seconds from the start of a process to the first line of metrics of a training (imports, scan, model, step), with
  an empty cache and with what an earlier training of the same version has cached;
- `step`: images/s of a training that computes (micro8 at 64 px, images small enough to stay in memory);
- `loader`: images/s of a training that waits for its images (a tiny model, JPEGs of 1.2 MP, random crops).

Prints for each the medians and the ratio NEW / OLD of the rounds: median (smallest to largest).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import PIL.Image
import torch

COMMON = [
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--seed",
    "0",
    "--kernels.global-attention",
    "fused",
    "--log.eval-every",
    "1000steps",
]
STEP = [
    "--model",
    "micro8",
    "--model.image-size",
    "64",
    "--batch-size",
    "32",
    "--epochs",
    "12",
    "--log.every",
    "4steps",
]
LOADER = [
    "--model",
    "nano16",
    "--model.depth",
    "1",
    "--model.embed-dim",
    "24",
    "--model.num-heads",
    "2",
    "--model.image-size",
    "128",
    "--batch-size",
    "16",
    "--epochs",
    "6",
    "--log.every",
    "4steps",
    "--data.decode",
    "exact",
]


def write_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write JPEGs of two classes, smooth noise of different coarseness."""
    for number in range(count):
        random = np.random.default_rng([number, *size])
        coarse = random.integers(0, 256, (9, 12, 3) if number % 2 else (36, 48, 3), dtype=np.uint8)
        path = folder / ("fine", "coarse")[number % 2] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC).save(path, quality=85)
    return folder


def command(tree: Path, cache: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """Return a command line of one version, and its environment."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "VITRAIL_CACHE": str(cache)}
    return [sys.executable, "-m", "vitrail", *words], environment


def seconds_of(tree: Path, cache: Path, *words: str) -> float:
    """Return how long a command takes."""
    line, environment = command(tree, cache, *words)
    start = time.perf_counter()
    subprocess.run(line, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def images_per_s(tree: Path, cache: Path, data: Path, out: Path, *words: str) -> float:
    """Return the median speed of a training, without its first two lines of metrics."""
    line, environment = command(tree, cache, "train", str(data), "--out", str(out), *COMMON, *words)
    subprocess.run(line, env=environment, check=True, capture_output=True)
    lines = [json.loads(each) for each in (out / "metrics.jsonl").read_text().splitlines()]
    return median([each["time/images_per_s"] for each in lines if "time/images_per_s" in each][2:])


def seconds_to_first_step(tree: Path, cache: Path, data: Path, out: Path) -> float:
    """Return the seconds until a training has written its first line of metrics; it is ended then."""
    line, environment = command(
        tree, cache, "train", str(data), "--out", str(out), *COMMON, *STEP, "--log.every", "1steps"
    )
    metrics, start = out / "metrics.jsonl", time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    took = time.perf_counter() - start
    process.kill()
    process.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"old": [], "new": []})
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small, large = write_images(root / "small", 192, (64, 64)), write_images(root / "large", 96, (1280, 960))
        for number in range(args.rounds):
            for which in ("old", "new") if number % 2 == 0 else ("new", "old"):
                tree, folder = getattr(args, which).resolve(), root / f"{number}-{which}"
                cache = folder / "cache"

                def note(what: str, value: float, which: str = which) -> None:
                    measured[what][which].append(value)

                note("help (s)", seconds_of(tree, cache, "--help"))
                note("train --help (s)", seconds_of(tree, cache, "train", "--help"))
                note("first step, nothing cached (s)", seconds_to_first_step(tree, cache, large, folder / "first"))
                note("first step, cached (s)", seconds_to_first_step(tree, cache, large, folder / "second"))
                note("step (images/s)", images_per_s(tree, cache, small, folder / "step", *STEP))
                note("loader (images/s)", images_per_s(tree, cache, large, folder / "loader", *LOADER))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds, alternating")
    for what, both in measured.items():
        ratios = [new / old for old, new in zip(both["old"], both["new"], strict=True)]
        spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{what:<32} old {median(both['old']):8.3f}  new {median(both['new']):8.3f}  new/old {spread}")


if __name__ == "__main__":
    main()
