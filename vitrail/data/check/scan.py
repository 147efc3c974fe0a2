"""The scan of a dataset: is every image whole, how large is it, is it there twice.

Decoding is the cost. So each image is decoded once and what is found is cached for all commands; and small images of one
size stay in memory from the scan on, where training and evaluation read them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image

from vitrail.data.cache.scans import ROW, THUMBNAIL, ColourCache, ScanCache
from vitrail.data.check.crop_duplicates import cropped_pairs
from vitrail.data.check.duplicates import duplicate_pairs, group_numbers, group_pairs
from vitrail.data.check.image_formats import FormatStats
from vitrail.data.datasets.base import ArrayDataset, Dataset, FileDataset, broken_image
from vitrail.data.datasets.keys import cache_name, image_keys
from vitrail.data.images.decode import ImageError, ImageInfo, read_described
from vitrail.data.problems import Kind, Problem
from vitrail.threads import ordered_map

# Images up to this side count as small: their decoded pixels are kept while they are all of one size.
SMALL_SIDE = 256
_SAMPLE = 64
_STORE_SECONDS = 120.0  # a long scan that is interrupted loses no more than this


@dataclass(frozen=True)
class Scan:
    """The result of a scan: sizes, duplicates, problems and formats of a dataset's images.

    Attributes:
        good: [N] whether each image can be used; False where it was not scanned.
        sizes: [N, 2] height and width, after EXIF rotation; 0 for broken ones and those not scanned.
        colour: whether any image has colour.
        pixels: uint8 [N, C, H, W] of the small images that were decoded, zeros for others; None where images are large, or
            differ in size, or there is no room.
        loaded: [N] whether `pixels` holds an image.
        groups: [N] group number; equal and nearly equal images share one, and so do those of one of the dataset's groups.
        problems: what was found.
        exact: [P, 2] pairs of equal images: each with the first that equals it.
        near: [Q, 2] pairs of nearly equal images, each the first of its equals.
        formats: how the files are stored.
        keys: [N] what each image is known by in the caches, zeros where it was not scanned; None where nothing is cached.
        num_cached: images that the cache knew, and that were not decoded.
    """

    good: np.ndarray
    sizes: np.ndarray
    colour: bool
    pixels: np.ndarray | None
    loaded: np.ndarray
    groups: np.ndarray
    problems: tuple[Problem, ...]
    exact: np.ndarray
    near: np.ndarray
    formats: FormatStats
    keys: np.ndarray | None = None
    num_cached: int = 0


class ScannedImage(NamedTuple):
    """What a scan makes of one image; `row` is None where it cannot be used."""

    row: np.ndarray | None
    pixels: np.ndarray
    error: ImageError | OSError | None = None
    info: ImageInfo | None = None


@dataclass(frozen=True)
class ScanSettings:
    """How a dataset is scanned.

    Attributes:
        damaged: stop, drop or keep: what becomes of broken files.
        near_duplicates: look for nearly equal images too.
        crops: look for slight crops among them.
        memory_bytes: small images stay in memory up to so much; 0: none do.
        channels: 3 or 1 fixes the pixel format; 0 takes grey when a sample of the images all is.
        fresh: decode also what is cached.
    """

    damaged: str
    near_duplicates: bool
    limit_pixels: int
    crops: bool = False
    memory_bytes: int = 0
    workers: int = 0
    channels: int = 0
    fresh: bool = False


def scan_dataset(
    dataset: Dataset,
    settings: ScanSettings,
    *,
    indices: np.ndarray | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Scan some images of a dataset, each of which is decoded at most once, and not at all where the cache has it.

    Args:
        indices: which images, ascending; None: all.
        advance: called with the number done and the total, for a progress bar.
    """
    count = len(dataset.paths)
    indices = np.arange(count) if indices is None else indices
    mode = pixel_mode(dataset, settings)
    cache = None
    if not isinstance(dataset, ArrayDataset):  # whose images are decoded already
        keys = image_keys(dataset, indices, mode, settings.workers)
        cache = ScanCache(cache_name(dataset), keys, mode, limit_pixels=settings.limit_pixels)
    scanner = _Scanner(dataset, settings, mode, indices, cache)
    scanner.run(advance)
    rows, good = scanner.rows, scanner.good
    usable = np.flatnonzero(good)
    exact, near = find_duplicates(dataset, rows, usable, settings)
    problems = [broken_image(dataset, index, error, settings.damaged) for index, error in scanner.errors]
    all_keys = None
    if cache is not None:
        all_keys = np.zeros(count, dtype=cache.keys.dtype)
        all_keys[indices] = cache.keys
    return Scan(
        good=good,
        sizes=np.ascontiguousarray(rows["size"]),
        colour=mode == "RGB",
        pixels=scanner.pixels,
        loaded=scanner.loaded,
        groups=group_numbers(count, exact, near, group_pairs(dataset.groups)),
        problems=tuple([*problems, *duplicate_warnings(dataset, exact, near)]),
        exact=exact,
        near=near,
        formats=scanner.stats,
        keys=all_keys,
        num_cached=scanner.num_cached,
    )


class _Scanner:
    """Goes through the images of a scan, and holds what is found."""

    def __init__(
        self,
        dataset: Dataset,
        settings: ScanSettings,
        mode: Literal["RGB", "L"],
        indices: np.ndarray,
        cache: ScanCache | None,
    ) -> None:
        count = len(dataset.paths)
        self.dataset, self.settings, self.indices, self.cache = dataset, settings, indices, cache
        self.mode: Literal["RGB", "L"] = mode
        self.rows, self.good = np.zeros(count, ROW), np.zeros(count, dtype=bool)
        self.pixels: np.ndarray | None = None
        self.loaded, self.keeping = np.zeros(count, dtype=bool), settings.memory_bytes > 0
        self.errors: list[tuple[int, ImageError | OSError]] = []
        self.stats = FormatStats(count, settings.limit_pixels)
        self.num_cached = 0

    def run(self, advance: Callable[[int, int], None]) -> None:
        """Scan all images."""
        total, known = len(self.indices), np.zeros(len(self.indices), dtype=bool)
        if self.cache is not None and not self.settings.fresh:
            rows, known = self.cache.read()
            self.rows[self.indices[known]], self.good[self.indices[known]] = rows[known], True
            self.stats.note_rows(self.indices[known], rows[known])
        self.num_cached, rest = int(known.sum()), np.flatnonzero(~known)
        scanned = ordered_map(
            lambda position: scan_image(self.dataset, int(self.indices[position]), self.mode, self.settings),
            rest.tolist(),
            self.settings.workers,
        )
        whole, stored_at = list[int](), time.monotonic()
        for number, (position, image) in enumerate(zip(rest.tolist(), scanned, strict=True)):
            if number % 256 == 0:
                advance(total - len(rest) + number, total)
            self.note(int(self.indices[position]), image)
            if image.row is not None and image.error is None:
                whole.append(position)
            if time.monotonic() - stored_at > _STORE_SECONDS:
                self.store(whole)
                whole, stored_at = [], time.monotonic()
        advance(total, total)
        self.store(whole)

    def store(self, positions: list[int]) -> None:
        """Cache the rows of images that were found whole."""
        if self.cache is not None and positions:
            self.cache.add(np.asarray(positions), self.rows[self.indices[positions]])

    def note(self, index: int, image: ScannedImage) -> None:
        """Keep what was found out about an image."""
        if image.info is not None:
            self.stats.note(index, image.info)
        if image.error is not None:
            self.errors.append((index, image.error))
        if image.row is None:
            return
        self.rows[index], self.good[index] = image.row, True
        if self.keeping and self.pixels is None:
            room = len(self.dataset.paths) * image.pixels.nbytes
            self.keeping = image.pixels.nbytes > 0 and room <= self.settings.memory_bytes
            if self.keeping:
                self.pixels = np.zeros((len(self.dataset.paths), *image.pixels.shape), dtype=np.uint8)
        if self.pixels is not None and image.pixels.shape == self.pixels.shape[1:]:
            self.pixels[index], self.loaded[index] = image.pixels, True
        elif self.keeping:
            self.keeping, self.pixels = False, None
            self.loaded[:] = False


def pixel_mode(dataset: Dataset, settings: ScanSettings) -> Literal["RGB", "L"]:
    """Return the pixel format of a scan: what the model wants, else grey where a sample of the images all is."""
    if settings.channels:
        return "RGB" if settings.channels == 3 else "L"
    return "RGB" if has_colour(dataset, settings) else "L"


def has_colour(dataset: Dataset, settings: ScanSettings) -> bool:
    """Whether any of a sample of images, spread over the dataset, has colour."""
    sample = np.unique(np.linspace(0, len(dataset.paths) - 1, _SAMPLE).astype(int))
    known, cache = np.zeros(len(sample), dtype=bool), None
    if not isinstance(dataset, ArrayDataset):
        keys = image_keys(dataset, sample, "RGB")
        damaged = settings.damaged == "keep"
        cache = ColourCache(cache_name(dataset), keys, limit_pixels=settings.limit_pixels, damaged=damaged)
        colour, known = cache.read()
        if colour[known].any():
            return True
    positions, results = [], []
    for position in np.flatnonzero(~known).tolist():
        try:
            red, green, blue = dataset.read(int(sample[position]), "RGB").split()
        except (ImageError, OSError):
            continue
        positions.append(position)
        results.append(red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes())
        if results[-1]:
            break
    if cache is not None and positions:
        cache.add(positions, results)
    return any(results)


def scan_image(dataset: Dataset, index: int, mode: Literal["RGB", "L"], settings: ScanSettings) -> ScannedImage:
    """Decode one image and make of it what a scan needs; an image that is an array has no format."""
    nothing = np.zeros(0, dtype=np.uint8)
    if isinstance(dataset, ArrayDataset):
        return summarise(dataset.read(index, mode), None)
    location = dataset.location(index)
    try:
        stored = location if isinstance(dataset, FileDataset) else dataset.encoded(index)
        image, info = read_described(stored, limit_pixels=settings.limit_pixels)
    except OSError as error:
        return ScannedImage(None, nothing, error)
    info = replace(info, path=location)
    error = None if info.verdict == "ok" else ImageError(info)
    if image is None or (error is not None and settings.damaged != "keep"):
        return ScannedImage(None, nothing, error, info)
    return summarise(image if image.mode == mode else image.convert(mode), info)._replace(error=error)


def summarise(image: PIL.Image.Image, info: ImageInfo | None) -> ScannedImage:
    """Return the cached row of a decoded image, and its pixels where it is small."""
    width, height = image.size
    pixels = np.asarray(image)
    digest = hashlib.blake2b(f"{width}x{height}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)  # no copy: a joined text of a photograph costs more than its hash
    grey = image.convert("L")
    if image.size != (THUMBNAIL, THUMBNAIL):
        grey = grey.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    row = np.zeros((), ROW)
    row["size"], row["thumbnail"] = (height, width), np.asarray(grey)
    row["digest"] = int.from_bytes(digest.digest(), "little")
    if info is not None:
        row["described"], row["mode"], row["format"] = 1, info.mode, info.format
        row["orientation"], row["bits"], row["alpha"], row["frames"] = (
            info.orientation,
            info.bits,
            info.alpha,
            info.frames,
        )
    return ScannedImage(row, small_pixels(pixels), None, info)


def small_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels of a small image as uint8 [C, H, W]; of a large one nothing."""
    if max(pixels.shape[:2]) > SMALL_SIDE:
        return np.zeros(0, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def find_duplicates(
    dataset: Dataset, rows: np.ndarray, usable: np.ndarray, settings: ScanSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of equal images [P, 2] and of nearly equal ones [Q, 2]."""
    thumbnails, digests = rows["thumbnail"], rows["digest"]
    exact, near = duplicate_pairs(thumbnails[usable], digests[usable], near=settings.near_duplicates)
    exact, near = usable[exact], usable[near]
    if settings.crops and settings.near_duplicates:
        firsts = np.setdiff1d(usable, exact[:, 1])
        crops = cropped_pairs(dataset, firsts, np.ascontiguousarray(rows["size"]), thumbnails, settings.workers)
        near = np.unique(np.concatenate([near, crops]), axis=0)
    return exact, near


def duplicate_warnings(dataset: Dataset, exact: np.ndarray, near: np.ndarray) -> list[Problem]:
    """Describe duplicates: across splits they leak, across labels they contradict, else they are only counted."""
    problems: list[Problem] = []
    kinds: tuple[tuple[np.ndarray, Kind, str], ...] = (
        (exact, "duplicate", "the same image"),
        (near, "near-duplicate", "nearly the same image"),
    )
    for pairs, kind, word in kinds:
        if not len(pairs):
            continue
        left, right = pairs[:, 0], pairs[:, 1]
        conflict = dataset.targets[left] != dataset.targets[right]
        across = np.zeros(len(pairs), bool) if dataset.split is None else dataset.split[left] != dataset.split[right]
        findings: tuple[tuple[np.ndarray, Kind, str], ...] = (
            (conflict, "label-conflict", f"{word} is in two classes"),
            (across, "leak", f"{word} is in two splits of the dataset"),
            (~conflict & ~across, kind, f"{word} is there more than once"),
        )
        for chosen, name, message in findings:
            if chosen.any():
                paths = tuple(dataset.paths[int(i)] for i in pairs[chosen].reshape(-1))
                example = f"{dataset.paths[left[chosen][0]]} and {dataset.paths[right[chosen][0]]}"
                problems.append(
                    Problem("warning", name, paths, f"{message}: {int(chosen.sum())} pairs, for instance {example}")
                )
    return problems
