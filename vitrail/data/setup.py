"""From the DATA that a user names to images that are scanned, split and read: for training, evaluation and check alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vitrail.config import DataConfig, RunConfig
from vitrail.console import Console, byte_size
from vitrail.data.cache.decoded import DecodedImageCache
from vitrail.data.check.scan import SMALL_SIDE, Scan, ScanSettings, scan_dataset, small_pixels
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
from vitrail.threads import ordered_map


@dataclass(frozen=True)
class CheckedData:
    """A dataset that was scanned, and its split."""

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

    @property
    def num_train(self) -> int:
        """Images in the training split."""
        return len(self.splits.indices["train"])

    def split(self, name: str) -> np.ndarray:
        """Return the indices of a split's images; none where there is no such split."""
        return self.splits.indices.get(name, np.zeros(0, dtype=np.int64))

    def loader(self, config: RunConfig, device: torch.device, world: World, *, num_views: int = 1) -> TrainLoader:
        """Return the endless training batches of one rank."""
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
            num_views=num_views,
            rank=world.data_rank,
            ranks=world.data_size,
        )

    def split_header(self, config: DataConfig) -> dict[str, Any]:
        """Return what the model file keeps of the split: enough to make it again and to know it."""
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


def load_data(
    config: DataConfig,
    console: Console,
    world: World = World(),  # noqa: B008 - frozen
    *,
    channels: int = 0,
    recorded: Path | None = None,
) -> CheckedData:
    """List a dataset, scan every image, and split it; collective, and the main rank scans for all.

    Args:
        channels: 3 or 1 fixes the pixel format; 0 lets the images decide.
        recorded: a split.json to take the split from.

    Raises:
        ValueError: the data cannot be trained on; the message lists every error.
    """
    dataset = list_dataset(config, console)
    stop_on_errors(dataset.problems)
    scan = scan_for_all(dataset, config, console, world, channels=channels)
    problems = [*dataset.problems, *scan.problems]
    if recorded:
        splits = load_splits(dataset, recorded, scan.good)
    else:
        splits = split_dataset(dataset, config, scan.good, scan.groups)
    found = check_trainable(dataset, splits)
    for problem in found:
        console.warn(problem.message)
    return CheckedData(dataset, scan, splits, tuple([*problems, *found]))


def list_dataset(config: DataConfig, console: Console) -> Dataset:
    """List the images of a dataset as a configuration wants them read.

    Raises:
        ValueError: there is no such dataset, or it is empty.
    """
    keep_damaged = config.damaged == "keep"
    return open_dataset(config.source, limit_pixels=config.limit_pixels, keep_damaged=keep_damaged, bar=console.bar)


def scan_for_all(dataset: Dataset, config: DataConfig, console: Console, world: World, *, channels: int = 0) -> Scan:
    """Scan a dataset on the main rank, and give every rank the result; collective.

    The arguments are those of `scan_or_stop`.
    """
    whole: list[Scan] = []

    def on_main() -> Scan:
        whole.append(scan_or_stop(dataset, config, console, channels=channels))
        return replace(whole[0], pixels=None)  # the others receive them where they are needed, as an array

    scan = world.run_on_main(on_main)
    refuse_other_listings(dataset, world)
    return whole[0] if whole else scan


def refuse_other_listings(dataset: Dataset, world: World) -> None:
    """Raise a ValueError on every rank where ranks have listed other images: indices would mean other files; collective."""
    if world.size == 1:
        return
    paths = hashlib.blake2b("\0".join(dataset.paths).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    if len(set(world.gather((len(dataset.paths), paths)))) > 1:
        raise ValueError(
            f"{dataset.name}: not all processes find the same images; files came or went while they were listed, or the "
            "machines see other folders; start again when all see the same"
        )


def scan_or_stop(
    dataset: Dataset,
    config: DataConfig,
    console: Console,
    *,
    indices: np.ndarray | None = None,
    channels: int = 0,
    fresh: bool = False,
) -> Scan:
    """Scan a dataset, and warn of what was found in listing and scanning.

    Args:
        indices: which images; None: all.
        channels: 3 or 1 fixes the pixel format; 0 lets the images decide.
        fresh: decode also what an earlier scan has found whole.

    Raises:
        ValueError: a file is broken and was to be reported.
    """
    settings = ScanSettings(
        damaged=config.damaged,
        near_duplicates=config.near_duplicates,
        limit_pixels=config.limit_pixels,
        memory_bytes=config.memory_bytes,
        workers=config.workers,
        channels=channels,
        fresh=fresh,
    )
    number = len(dataset.paths) if indices is None else len(indices)
    with console.bar(f"scanning {number:,} images") as advance:
        scan = scan_dataset(dataset, settings, indices=indices, advance=advance)
    for problem in (*dataset.problems, *scan.problems):
        if problem.severity == "warning":
            console.warn(problem.message)
    stop_on_errors(scan.problems)
    return scan


def build_train_data(checked: CheckedData, config: RunConfig, world: World = World()) -> TrainData:  # noqa: B008
    """Give the checked images the preprocessing of a run; collective."""
    preprocess = preprocess_from_config(config)
    used = np.concatenate(list(checked.splits.indices.values()))
    side = preprocess.image_size
    # Crops of images larger than the model's input must be shrunk with antialiasing, which only the path from files does.
    stored = stored_pixels(checked.dataset, checked.scan, used, preprocess, config.data, world, largest=side)
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


def build_eval_reader(
    dataset: Dataset, targets: np.ndarray, scan: Scan, used: np.ndarray, preprocess: Preprocess, config: DataConfig
) -> ImageReader:
    """Return the reader of some images as a model wants them; small ones are in memory from the scan on.

    Args:
        targets: [N] class index of every image, as the model numbers its classes.
        used: the images that are needed.
    """
    pixels = stored_pixels(dataset, scan, used, preprocess, config)
    reader = ImageReader(dataset, targets, preprocess, pixels, workers=config.workers)
    reader.is_ready = pixels is not None and is_identity(preprocess, (pixels.shape[2], pixels.shape[3]))
    return reader


def stored_pixels(
    dataset: Dataset,
    scan: Scan,
    used: np.ndarray,
    preprocess: Preprocess,
    config: DataConfig,
    world: World = World(),  # noqa: B008 - frozen
    *,
    largest: int = SMALL_SIDE,
) -> np.ndarray | None:
    """Return the pixels of images that are small, of one size and fit in memory, uint8 [N, C, H, W]; else None.

    Collective: what the scan has not decoded, since it was cached, the main rank decodes now for all.

    Args:
        used: the images that are needed; others may be zero.
        largest: no image has a longer side, pixels.
    """
    sizes = scan.sizes[scan.good]
    high, wide = (int(side) for side in sizes[0]) if len(sizes) else (0, 0)
    channels = 3 if scan.colour else 1
    room = len(dataset.paths) * channels * high * wide
    small = (
        0 < max(high, wide) <= min(SMALL_SIDE, largest)
        and bool((sizes == sizes[0]).all())
        and room <= config.memory_bytes
    )
    if not small or channels != preprocess.channels:
        return None
    loaded: list[np.ndarray] = []
    world.run_on_main(lambda: loaded.append(decode_small(dataset, scan, used, (high, wide), config.workers)))
    return world.broadcast_array(loaded[0] if loaded else None)


def decode_small(dataset: Dataset, scan: Scan, used: np.ndarray, size: tuple[int, int], workers: int) -> np.ndarray:
    """Return the pixels of small images of one size (h, w), uint8 [N, C, H, W]; those the scan has decoded are not read.

    Raises:
        ValueError, OSError: an image can no longer be read.
    """
    mode: Literal["RGB", "L"] = "RGB" if scan.colour else "L"
    pixels = scan.pixels
    if pixels is None:
        pixels = np.zeros((len(dataset.paths), len(mode), *size), dtype=np.uint8)
    missing = used[~scan.loaded[used]].tolist()
    decoded = ordered_map(lambda index: small_pixels(np.asarray(dataset.read(index, mode))), missing, workers)
    for index, image in zip(missing, decoded, strict=True):
        pixels[index] = image
    return pixels


def open_decoded_cache(checked: CheckedData, reader: ImageReader, config: DataConfig) -> DecodedImageCache:
    """Return the cache of decoded training images."""
    dataset, cut = checked.dataset, replace(reader.crop_reader, side=config.cache_side)

    def depends_on(indices: np.ndarray) -> list[object]:
        keys = checked.scan.keys
        keys = image_keys(dataset, indices, cut.mode, config.workers) if keys is None else keys[indices]
        resized_by = torch.__version__ if cut.fast else ""
        return [cut.mode, cut.interpolation, cut.fast, resized_by, hashlib.blake2b(keys.tobytes()).hexdigest()]

    return DecodedImageCache(
        dataset.name,
        checked.splits.indices["train"],
        checked.scan.sizes,
        side=config.cache_side,
        channels=3 if cut.mode == "RGB" else 1,
        limit_bytes=config.cache_bytes,
        decode=lambda index: cut.whole(dataset, index),
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
    """Print where training images are cached decoded, or why they are not."""
    cache, total = data.reader.cache, len(data.splits.indices["train"])
    if cache is not None:
        rest = (
            ""
            if cache.num_stored == total
            else f"; the other {total - cache.num_stored:,} do not fit in data.cache_bytes"
        )
        console.info(
            f"{cache.num_stored:,} training images are cached decoded in {cache.folder}, {byte_size(cache.num_bytes)}{rest}"
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
