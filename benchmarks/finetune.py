"""Fine-tuning against training from scratch in the same time, on few images of classes that the weights never saw.

python benchmarks/finetune.py path/to/cifar10 --seeds 3

`path/to/cifar10` holds train/ and test/ with a folder per class. micro4 is trained on half of the classes; then each way
learns the other half from a few images of each. With --epochs every way takes as many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import vitrail
from vitrail.console import Console
from vitrail.machine import processor_name
from vitrail.weights.model_file import versions

QUIET = Console(quiet=True)
# Way → whether it starts from the trained weights, and its settings beside `auto`'s.
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "from scratch": (False, {"model": "micro4"}),
    "fine-tuning": (True, {}),
    "fine-tuning, one learning rate": (True, {"optim.layer_decay": 1.0}),
    "fine-tuning, no head warm-up": (True, {"optim.head_warmup": "0 steps"}),
    "LoRA of rank 8": (True, {"lora.rank": 8}),
    "head only": (
        True,
        {"optim.freeze": ("patch_embed", "blocks", "fc_norm"), "optim.head_warmup": "0 steps", "optim.layer_decay": 1.0},
    ),
}  # fmt: skip


def main() -> None:
    """Train the start once, then every way with every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--few", type=int, default=100, help="training images of each new class")
    parser.add_argument("--epochs", type=float, help="of every way; auto's own for fine-tuning unless given")
    parser.add_argument("--pretrain-epochs", type=float, default=2.4)
    parser.add_argument("--work", type=Path, help="keep dataset and trained weights in this folder, and use them again")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    print(f"{processor_name()}; {versions()}")
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        old, new = halves(args.data, work, args.few)
        start = pretrained(old, work / "start", args.pretrain_epochs)
        print(f"start: {vitrail.load(start).header.metrics['top1']:.4f} of the validation split of its own classes")
        for way in args.ways:
            compare(way, new, start, args)


def compare(way: str, data: Path, start: Path, args: argparse.Namespace) -> None:
    """Train one way with every seed and print its row."""
    uses_start, settings = WAYS[way]
    settings = {**settings, **({"model": str(start)} if uses_start else {})}
    if args.epochs is not None:
        settings["epochs"] = args.epochs
    scores, seconds = [], []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            result = vitrail.train(data, out=Path(folder) / "run", console=QUIET, seed=seed, **settings)
            seconds.append(time.perf_counter() - started)
        scores.append(result.top1)
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    print(
        f"| {way} | {100 * statistics.mean(scores):.1f} ± {100 * spread:.1f} % | {100 * min(scores):.1f} to "
        f"{100 * max(scores):.1f} % | {statistics.mean(seconds):.0f} s | n = {len(scores)} |",
        flush=True,
    )


def halves(data: Path, work: Path, few: int) -> tuple[Path, Path]:
    """Return folders of links: all images of the first half of the classes, and a few of each of the second."""
    classes = sorted(path.name for path in (data / "train").iterdir())
    middle = len(classes) // 2
    old, new = work / "old", work / f"new-{few}"
    for root, names, count in ((old, classes[:middle], None), (new, classes[middle:], few)):
        if root.exists():
            continue
        for name in names:
            train, test = (sorted((data / split / name).iterdir()) for split in ("train", "test"))
            link(train[:count], root / "train" / name)
            link(test[: len(test) // 5], root / "val" / name)
            link(test[len(test) // 5 :], root / "test" / name)
    return old, new


def link(files: list[Path], folder: Path) -> None:
    """Make a folder of links to files."""
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def pretrained(data: Path, out: Path, epochs: float) -> Path:
    """Return a run on the first half of the classes."""
    if not (out / "report.html").exists():
        vitrail.train(data, out=out, model="micro4", epochs=epochs, console=QUIET, seed=0)
    return out


if __name__ == "__main__":
    main()
