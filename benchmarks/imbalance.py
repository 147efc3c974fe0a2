"""Uneven classes: what sampling and loss weights do to a ViT from scratch, on a long-tailed subset of Fashion-MNIST.

python benchmarks/imbalance.py fashion_mnist.npz --ratio 100 --seeds 3
python benchmarks/imbalance.py fashion_mnist.npz --ratio 10 --corrections natural sqrt

Any .npz with x_train, y_train, x_test, y_test of ten classes will do. Class sizes fall geometrically from --largest to
--largest / --ratio; which class is how rare is drawn anew with each seed, and is the same for all corrections. Evaluated on
300 test images of every class: accuracy there is the mean recall of the classes. From the recalls follow the accuracy at the
training split's own frequencies, and the mean recall of the three largest and the three smallest classes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import vitrail
from vitrail.console import Console
from vitrail.machine import processor_name
from vitrail.weights.model_file import versions

CORRECTIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "balanced": {"data.sampling": "balanced"},
    "sqrt": {"data.sampling": "sqrt"},
    "inverse": {"optim.class_weights": "inverse"},
    "effective": {"optim.class_weights": "effective"},
}
_TEST = 300


def main() -> None:
    """Train once per correction and seed, and print mean and spread of each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arrays", type=Path)
    parser.add_argument("--ratio", type=float, default=100)
    parser.add_argument("--largest", type=int, default=1500)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--model", default="micro4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS), choices=list(CORRECTIONS))
    args = parser.parse_args()
    print(f"{processor_name()}; {versions()}")
    rows_of: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            sizes = write_folders(args.arrays, Path(folder) / "data", args.largest, args.ratio, seed)
            for name in args.corrections:
                settings = CORRECTIONS[name] | {"epochs": args.epochs, "seed": seed, "log.eval_every": "20 %"}
                out = Path(folder) / name
                result = vitrail.train(
                    Path(folder) / "data", out=out, model=args.model, console=Console(quiet=True), **settings
                )
                rows = result.evaluation["test"]["per_class"]
                figures = summary(np.asarray([rows[label]["recall"] for label in sizes]), np.asarray([*sizes.values()]))
                rows_of.setdefault(name, []).append(figures)
                print(name, seed, json.dumps(figures), flush=True)
    for name, rows in rows_of.items():
        for figure in rows[0]:
            values = [row[figure] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:<10}{figure:<10}{statistics.mean(values):7.2%} ± {spread:.2%}  n = {len(values)}")


def write_folders(arrays: Path, root: Path, largest: int, ratio: float, seed: int) -> dict[str, int]:
    """Write the long-tailed training images and the test images as class folders; return the classes' sizes."""
    stored = np.load(arrays)
    ranks = np.random.default_rng(seed).permutation(10)
    sizes = {str(label): round(largest * ratio ** (-ranks[label] / 9)) for label in range(10)}
    for split, images, targets in (("train", "x_train", "y_train"), ("test", "x_test", "y_test")):
        for label, size in sizes.items():
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            chosen = np.flatnonzero(stored[targets] == int(label))[: size if split == "train" else _TEST]
            for number, image in enumerate(stored[images][chosen]):
                PIL.Image.fromarray(image).save(folder / f"{number:04d}.png")
    return {f"class {label}": size for label, size in sizes.items()}


def summary(recalls: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Return accuracy with even classes, with classes as in training, and of the largest and the smallest classes."""
    order = np.argsort(-sizes, kind="stable")
    return {
        "even": float(recalls.mean()),
        "as_found": float((recalls * sizes).sum() / sizes.sum()),
        "largest3": float(recalls[order[:3]].mean()),
        "smallest3": float(recalls[order[-3:]].mean()),
    }


if __name__ == "__main__":
    main()
