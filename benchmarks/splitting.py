"""Splitting a million images and recording it: seconds and memory of each step.

    python benchmarks/splitting.py [--rows N] [--classes C] [--grouped SHARE]

The dataset is made up (no files); `--grouped` is the share of images that lie in groups of four. Memory is the peak of the
process's resident set in each step, less what it was before the step.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitrail.config import DataConfig
from vitrail.data.datasets.base import ArrayDataset
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.splits.splits import fingerprint, load_splits, save_splits, split_dataset, stratified

T = TypeVar("T")


def main() -> None:
    """Print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--grouped", type=float, default=0.2)
    args = parser.parse_args()
    rows, random = args.rows, np.random.default_rng(0)
    targets = random.integers(0, args.classes, rows)
    groups = np.arange(rows)
    together = int(rows * args.grouped) // 4 * 4
    groups[:together] = np.repeat(np.arange(together // 4), 4)
    groups = groups[random.permutation(rows)]
    dataset = ArrayDataset(
        name="listing",
        labels=tuple(f"n{label:08d}" for label in range(args.classes)),
        paths=StringArray(f"n{label:08d}/n{label:08d}_{number}.JPEG" for number, label in enumerate(targets)),
        targets=targets,
        arrays=(),
    )
    good = np.ones(rows, dtype=bool)
    step("stratified", lambda: stratified(np.arange(rows), targets, groups, 0.2, 0))
    splits = step("split_dataset", lambda: split_dataset(dataset, DataConfig(), good, groups))
    print(splits.fingerprint, {split: len(indices) for split, indices in splits.indices.items()})
    step("fingerprint", lambda: fingerprint(dataset, splits.indices))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "split.json"
        step("save_splits", lambda: save_splits(dataset, splits, path))
        print(f"split.json: {path.stat().st_size / 1e6:.0f} MB")
        step("load_splits", lambda: load_splits(dataset, path))


def step(name: str, do: Callable[[], T]) -> T:
    """Return what `do` returns, and print how long it took and how much memory."""
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = do()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    print(f"{name:<12}{seconds:7.2f} s  {max(0, peak[0] - before) / 1e6:6.0f} MB more at the peak", flush=True)
    return result


def resident() -> int:
    """Return the process's resident set in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
