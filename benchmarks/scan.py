"""The scan of every image before training, on a folder: seconds for listing, decoding, hashing, duplicates.

    python benchmarks/scan.py path/to/cifar10 [--rounds 5]

Each round is the same work as `vitrail train` does before its first step; files are in the page cache from round 1 on.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.cache.scans import THUMBNAIL
from vitrail.data.check.duplicates import hashes
from vitrail.data.setup import load_data
from vitrail.machine import processor_name


def main() -> None:
    """Measure the whole scan, and the perceptual hash alone on as many random grey thumbnails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    whole, hashing, count = [], [], 0
    for _ in range(args.rounds):
        started = time.perf_counter()
        checked = load_data(DataConfig(source=args.data), Console(quiet=True))
        whole.append(time.perf_counter() - started)
        count = len(checked.dataset.paths)
        thumbnails = np.random.default_rng(0).integers(0, 256, (count, THUMBNAIL, THUMBNAIL), dtype=np.uint8)
        started = time.perf_counter()
        hashes(thumbnails)
        hashing.append(time.perf_counter() - started)
    print(f"{processor_name()}, {count:,} images, n = {args.rounds}")
    for name, values in (("list, decode, hash, find duplicates, split", whole), ("of it, the hash", hashing)):
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
