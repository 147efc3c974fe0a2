"""From a source's name to data that is checked, divided and ready to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.config import DataConfig, RunConfig
from vitrail.console import Console, byte_size
from vitrail.data.cache.decoded import DecodedImageCache
from vitrail.data.cache.scans import ScanCache
from vitrail.data.check.scan import Scan, scan_dataset
from vitrail.data.datasets.base import Dataset
from vitrail.data.datasets.keys import image_keys
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.preprocess import Preprocess, preprocess_from_config
from vitrail.data.loading.class_weights import loss_weights
from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import TrainLoader
from vitrail.data.problems import Problem, stop_on_errors
from vitrail.data.splits.splits import Splits, check_trainable, load_splits, split_dataset
from vitrail.distributed import World


@dataclass(frozen=True)
class CheckedData:
    """A source that was looked at whole, and its division."""

    dataset: Dataset
    scan: Scan
    splits: Splits
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class TrainData:
    """The images as the model will see them."""

    dataset: Dataset
    splits: Splits
    reader: ImageReader

    def loader(self, config: RunConfig, device: torch.device, world: World) -> TrainLoader:
        """Return the endless training batches of one process."""
        return TrainLoader(
            self.reader,
            self.splits.indices["train"],
            batch_size=config.batch_size,
            seed=config.seed,
            augment=config.augment,
            device=device,
            patch_sizes=config.model.patch_sizes,
            sampling=config.data.sampling,
            weights=loss_weights(self.dataset, self.splits.indices["train"], config.optim),
            rank=world.rank,
            ranks=world.size,
        )

    def split_header(self, config: DataConfig) -> dict[str, Any]:
        """Return what the model file keeps of the division: enough to make it again and to know it."""
        return {
            "fingerprint": self.splits.fingerprint,
            "source": self.dataset.name,
            "val_fraction": config.val_fraction,
            "test_fraction": config.test_fraction,
            "split_seed": config.split_seed,
            "folds": config.folds,
            "fold": config.fold,
            "near_duplicates": config.near_duplicates,
        }


def load_data(config: DataConfig, console: Console, *, channels: int = 0, recorded: Path | None = None) -> CheckedData:
    """Open a source, look at every image, divide it.

    Args:
        channels: 3 or 1 fixes the pixel format; 0 lets the images decide.
        recorded: a split.json to take the division from.

    Raises:
        ValueError: the data cannot be trained on; the message lists every error.
    """
    dataset = open_dataset(
        config.source, limit_pixels=config.limit_pixels, keep_damaged=config.damaged == "keep", bar=console.bar
    )
    stop_on_errors(dataset.problems)
    scan = scan_or_stop(dataset, config, console, channels=channels)
    problems = [*dataset.problems, *scan.problems]
    splits = (
        load_splits(dataset, recorded, scan.good)
        if recorded
        else split_dataset(dataset, config, scan.good, scan.groups)
    )
    found = check_trainable(dataset, splits)
    for problem in found:
        console.warn(problem.message)
    return CheckedData(dataset, scan, splits, tuple([*problems, *found]))


def scan_or_stop(
    dataset: Dataset, config: DataConfig, console: Console, *, channels: int = 0, cache: ScanCache | None = None
) -> Scan:
    """Look at every image of a source, and warn of what was found in listing and in looking.

    Args:
        channels: 3 or 1 fixes the pixel format; 0 lets the images decide.
        kept: earlier looks, which are taken where a file is unchanged.

    Raises:
        ValueError: a file is broken and was to be reported.
    """
    with console.bar(f"looking at {len(dataset.paths):,} images") as advance:
        scan = scan_dataset(
            dataset,
            cache=cache,
            damaged=config.damaged,
            near_duplicates=config.near_duplicates,
            memory_bytes=config.memory_bytes,
            workers=config.workers,
            channels=channels,
            advance=advance,
        )
    for problem in (*dataset.problems, *scan.problems):
        if problem.severity == "warning":
            console.warn(problem.message)
    stop_on_errors(scan.problems)
    return scan


def build_train_data(checked: CheckedData, config: RunConfig) -> TrainData:
    """Give the checked images the preprocessing of a run."""
    preprocess = preprocess_from_config(config)
    stored = checked.scan.pixels
    side = preprocess.image_size
    if stored is not None and (stored.shape[1] != preprocess.channels or max(stored.shape[2:]) > side):
        # Larger than the model's input: a crop must be shrunk with antialiasing, which only the path from files does.
        stored = None
    reader = ImageReader(
        checked.dataset,
        checked.dataset.targets,
        preprocess,
        stored,
        workers=config.data.workers,
        sizes=checked.scan.sizes,
        fast=config.data.decode == "fast",
    )
    if stored is not None:
        reader.is_ready = is_identity(preprocess, (stored.shape[2], stored.shape[3]))
        value_bytes = 4 if preprocess.resampler == "fractions" else 1
        fits = len(stored) * preprocess.channels * side**2 * value_bytes <= config.data.memory_bytes
        if not reader.is_ready and config.augment.crop_scale == 1.0:
            # Without crops, training sees the very images that are evaluated: prepare them once.
            done = np.stack([reader.read_whole(index) for index in range(len(stored))]) if fits else None
            reader.stored, reader.is_ready = done, done is not None
    elif config.data.cache_side:
        reader.cache = open_decoded_cache(checked, reader, config.data)
    return TrainData(checked.dataset, checked.splits, reader)


def open_decoded_cache(checked: CheckedData, reader: ImageReader, config: DataConfig) -> DecodedImageCache:
    """Return the cache of decoded training images."""
    source, cut = checked.dataset, replace(reader.crop_reader, side=config.cache_side)

    def depends_on(indices: np.ndarray) -> list[object]:
        keys = image_keys(source, indices, cut.mode, config.workers)
        resized_by = torch.__version__ if cut.fast else ""
        return [cut.mode, cut.interpolation, cut.fast, resized_by, hashlib.blake2b(keys.tobytes()).hexdigest()]

    return DecodedImageCache(
        source.name,
        checked.splits.indices["train"],
        checked.scan.sizes,
        side=config.cache_side,
        channels=3 if cut.mode == "RGB" else 1,
        limit_bytes=config.cache_bytes,
        decode=lambda index: cut.whole(source, index),
        depends_on=depends_on,
    )


def check_cache_settings(config: RunConfig) -> None:
    """Raise a ValueError when a cache was asked for that no training could use."""
    side, size = config.data.cache_side, config.model.image_size
    if side and config.augment.crop_scale == 1:
        raise ValueError(
            f"data.cache_side {side} keeps images for random crops, but augment.crop_scale is 1; set it below 1, or leave "
            "the cache out"
        )
    if 0 < side < size:
        raise ValueError(
            f"data.cache_side is {side}, less than model.image_size {size}, so that crops would be enlarged; try "
            f"{round(size * 8 / 7)}"
        )


def report_cache(data: TrainData, config: DataConfig, console: Console) -> None:
    """Say where training images are kept decoded, or why they are not."""
    cache, total = data.reader.cache, len(data.splits.indices["train"])
    if cache is not None:
        rest = (
            ""
            if cache.num_stored == total
            else f"; the other {total - cache.num_stored:,} do not fit in data.cache_bytes"
        )
        console.info(
            f"{cache.num_stored:,} training images are kept decoded in {cache.folder}, {byte_size(cache.num_bytes)}{rest}"
        )
    elif config.cache_side:
        console.info("data.cache_side has nothing to do: the images are in memory, decoded")


def is_identity(preprocess: Preprocess, size: tuple[int, int]) -> bool:
    """Whether preprocessing leaves images of this size as they are."""
    side = preprocess.image_size
    if preprocess.resize == "aspect":
        return preprocess.aspect_size(size[1], size[0]) == (size[1], size[0])
    uncropped = preprocess.resize == "squash" or int(side / preprocess.crop_fraction) <= side
    return size == (side, side) and uncropped
