"""What `data.decode fast` does to accuracy: the same trainings with exact and with fast crops, pair by pair.

    python benchmarks/fast_decode.py DATA [--side 64] [--epochs 20] [--seeds 5]

DATA is a folder with train/ and val/ whose images are at least twice as large as `--side`, so that JPEGs are decoded
smaller. Prints top-1 on val/ for every seed, and the mean difference with its standard error; evaluation is exact for both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from vitrail.api import train
from vitrail.console import Console


def main() -> None:
    """Train pairs, seed by seed, and print the mean difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    top1: dict[str, list[float]] = {"exact": [], "fast": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for decode, values in top1.items():
                settings = {"model.image_size": args.side, "data.decode": decode, "epochs": args.epochs}
                result = train(
                    args.data,
                    out=Path(folder) / f"{decode}-{seed}",
                    model="nano8",
                    seed=seed,
                    console=Console(quiet=True),
                    **settings,
                    **{"log.eval_every": "100 %", "data.near_duplicates": False},
                )
                values.append(result.evaluation["val"]["top1"])
            print(f"seed {seed}: exact {top1['exact'][-1]:.4f}, fast {top1['fast'][-1]:.4f}", flush=True)
    difference = np.asarray(top1["fast"]) - np.asarray(top1["exact"])
    error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else float("nan")
    print(
        f"fast - exact: {100 * difference.mean():+.2f} points, standard error {100 * error:.2f}, n = {len(difference)}"
    )


if __name__ == "__main__":
    main()
