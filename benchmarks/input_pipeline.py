"""From files to ready batches: images/s of Vitrail's loader and of torchvision's ImageFolder + DataLoader + v2 on PIL.

    python benchmarks/input_pipeline.py DATA [--side 224] [--rounds 5] [--forms exact fast cached memory] [--workers 2]

DATA is a folder of class folders (without train/ and val/), which both read. Both give shuffled batches of float tensors,
cropped (random resized crop, area 8 to 100 %), mirrored at random and normalised; interpolation is the same. Ours decodes on as many threads as the
peer has worker processes. Both run in this process's cores, alternating, a whole pass a round after one to warm up; the
peer's worker start is not counted (persistent workers). "cached" is what the second epoch and later ones read;
"memory" are small images of one size, which Vitrail keeps decoded.

    python benchmarks/input_pipeline.py DATA --memory

measures the peak memory of the input path alone: the process and its workers, as the sum of proportional set sizes
(shared pages counted once), above what is taken after listing; the peer with 8 workers. DATA should hold some thousand
images, or the peer's workers have less to hold than they would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

BATCH = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(data: str, side: int, interpolation: str, form: str, workers: int) -> Callable[[int], int]:
    """Return a function that reads the dataset once, pass `number`, and returns how many images it read."""
    from vitrail.config import AugmentConfig, DataConfig, PreprocessConfig, RunConfig
    from vitrail.console import Console
    from vitrail.data.setup import build_train_data, load_data
    from vitrail.distributed import World
    from vitrail.models.config import ViTConfig

    config = RunConfig(
        data=DataConfig(
            source=data,
            val_fraction=0.02,
            workers=workers,
            near_duplicates=False,
            memory_bytes=2 * 10**9 if form == "memory" else 0,
            decode="exact" if form == "exact" else "fast",
            cache_side=round(side * 8 / 7) if form == "cached" else 0,
        ),
        model=ViTConfig(image_size=side, patch_size=side // 8, embed_dim=8, depth=1, num_heads=1, num_classes=2),
        preprocess=PreprocessConfig(mean=MEAN, std=STD, interpolation=interpolation),
        augment=AugmentConfig(crop_scale=0.08, flip=0.5),
        batch_size=BATCH,
    )
    train_data = build_train_data(load_data(config.data, Console(quiet=True), channels=3), config)
    assert (train_data.reader.stored is not None) == (form == "memory")
    loader = train_data.loader(config, torch.device("cpu"), World())
    steps = -(-len(train_data.splits.indices["train"]) // BATCH)

    def one_pass(number: int) -> int:
        return sum(len(batch.images) for batch in loader.batches(number * steps, (number + 1) * steps))

    return one_pass


def theirs(data: str, side: int, interpolation: str, workers: int) -> Callable[[int], int]:
    """Return the same for torchvision's loader, set up as in its reference trainings."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side, interpolation=InterpolationMode[interpolation.upper()], antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
        ]
    )
    loader = DataLoader(
        ImageFolder(data, transform),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def one_pass(number: int) -> int:
        return sum(len(images) for images, _ in loader)

    return one_pass


def compare(data: str, side: int, interpolation: str, form: str, workers: int, rounds: int) -> None:
    """Print images/s of both, round by round alternating, and the ratio."""
    passes = {"vitrail": ours(data, side, interpolation, form, workers)}
    passes["torchvision"] = theirs(data, side, interpolation, workers)
    speed: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, one_pass in passes.items():
            start = time.perf_counter()
            # Several passes over a small dataset, so that a round is long enough to be measured.
            count, passes_done = 0, 0
            while time.perf_counter() - start < 2.0:
                count += one_pass(100 * number + passes_done)
                passes_done += 1
            if number:
                speed[name].append(count / (time.perf_counter() - start))
    ratios = np.asarray(speed["vitrail"]) / np.asarray(speed["torchvision"])
    figures = {name: [round(float(x)) for x in np.percentile(values, [0, 50, 100])] for name, values in speed.items()}
    low, middle, high = np.percentile(ratios, [0, 50, 100])
    print(f"{form:7s} {interpolation:9s} ratio {middle:.2f} ({low:.2f} to {high:.2f}, n = {rounds}) ", end="")
    print(
        f"images/s min/median/max {figures}; per core {figures['vitrail'][1] / (os.cpu_count() or 1):.0f}", flush=True
    )


def memory(command: list[str]) -> None:
    """Print the peak memory of two passes in a process of its own, watched from this one.

    The sum of proportional set sizes of the process and its children, less that after listing: of all pages, and
    without those of mapped files, which the system can take back.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        who = child.stdout.readline().strip()  # it is ready
        before = most = total(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            most = np.maximum(most, total(child.pid))
            time.sleep(0.02)
    all_pages, own = ((most - before) / 1e6).round().astype(int).tolist()
    print(json.dumps({"who": who, "MB": all_pages, "MB without mapped files": own}), flush=True)


def total(parent: int) -> np.ndarray:
    """Return the memory of a process and its children in bytes: all pages, and without those of mapped files."""
    children = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    sums = np.zeros(2)
    for pid in [parent, *map(int, children.stdout.split())]:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                size = 1024 * int(line.split()[1]) if line.startswith("Pss") else 0
                sums += size * np.asarray([line.startswith("Pss:"), line.startswith(("Pss_Anon:", "Pss_Shmem:"))])
    return sums


def two_passes(data: str, side: int, interpolation: str, who: str) -> None:
    """List the files (ours scans them), wait for a line on stdin, read the dataset twice: the process that `memory` watches."""
    import torchvision.transforms.v2  # noqa: F401 - importing is not the input path

    import vitrail.data.setup  # noqa: F401

    one_pass = theirs(data, side, interpolation, 8) if who == "torchvision" else ours(data, side, interpolation, who, 0)
    print(who, flush=True)
    sys.stdin.readline()
    one_pass(0)
    one_pass(1)


def lines() -> Iterator[str]:
    """Yield lines that name the machine and the versions."""
    import PIL
    import simplejpeg
    import torchvision

    yield f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    yield f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"


def main() -> None:
    """Measure speed, or memory with `--memory`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=["exact", "fast", "cached"])
    parser.add_argument("--interpolations", nargs="+", default=["bilinear", "bicubic"])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who:
        two_passes(args.data, args.side, args.interpolations[0], args.who)
        return
    print("\n".join(lines()))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VITRAIL_CACHE"] = cache
        if args.memory:
            for who in ("torchvision", *args.forms):
                memory([sys.executable, *sys.argv, "--who", who])
            return
        for interpolation in args.interpolations:
            for form in args.forms:
                compare(args.data, args.side, interpolation, form, args.workers, args.rounds)


if __name__ == "__main__":
    main()
