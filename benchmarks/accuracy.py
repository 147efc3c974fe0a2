"""Accuracy of the default recipe over several seeds: mean, spread, time.

python benchmarks/accuracy.py digits --seeds 5
python benchmarks/accuracy.py path/to/cifar10 --seeds 1 --epochs 3
python benchmarks/accuracy.py digits --seeds 3 --epochs 20 --set model.positions=learned --model nano2
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import vitrail
from vitrail.console import Console
from vitrail.machine import processor_name
from vitrail.weights.model_file import versions


def main() -> None:
    """Train once per seed, and print mean and spread of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", help="VALUE in JSON, or plain text"
    )
    args = parser.parse_args()
    print(f"{processor_name()}; {versions()}")
    figures: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        of_seed = train_once(args, seed)
        for name, value in of_seed.items():
            figures.setdefault(name, []).append(value)
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in of_seed.items()), flush=True)
    for name, values in figures.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(
            f"{name}: mean {statistics.mean(values):.4g}, deviation {spread:.2g}, {min(values):.4g} to {max(values):.4g}, n = {len(values)}"
        )


def train_once(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train with one seed; returns the top-1 of every split, the time of the whole command, and the speed."""
    settings: dict[str, Any] = {} if args.epochs is None else {"epochs": args.epochs}
    settings |= dict(read_setting(text) for text in args.set)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = vitrail.train(
            args.data,
            out=Path(folder) / "run",
            model=args.model,
            console=Console(quiet=True),
            seed=seed,
            **settings,
        )
        seconds = time.perf_counter() - started
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["time/images_per_s"] for line in lines if "time/images_per_s" in line]
    waits = [line["time/data_wait"] for line in lines if "time/data_wait" in line]
    return {split: metrics["top1"] for split, metrics in result.evaluation.items()} | {
        "seconds, all": seconds,
        "images/s": statistics.median(speeds),
        "data wait": statistics.median(waits),
    }


def read_setting(text: str) -> tuple[str, Any]:
    """Return the setting and the value of `optim.lr=1e-3`; the value is JSON, or plain text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    main()
