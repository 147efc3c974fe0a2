"""The look at every image before training: is it whole, how large, is it there twice.

Decoding is the cost, so small images of one size stay in memory from this pass on: for them, scan and load are one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
import PIL.Image

from vitrail.data.cache.scans import THUMBNAIL
from vitrail.data.check.crop_duplicates import cropped_pairs
from vitrail.data.check.duplicates import duplicate_pairs, group_numbers, group_pairs
from vitrail.data.datasets.base import ArrayDataset, Dataset, FileDataset, broken_image
from vitrail.data.images.decode import ImageError, ImageInfo, read_described
from vitrail.data.problems import Kind, Problem
from vitrail.threads import ordered_map

if TYPE_CHECKING:
    from vitrail.data.cache.scans import ScanCache
    from vitrail.data.check.image_formats import FormatStats

# Images up to this side count as small: their decoded pixels are kept while they are all of one size.
_SMALL_SIDE = 256
_SAMPLE = 64

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scan:
    """What the images of a source are.

    Attributes:
        good: [N] whether each image can be used.
        sizes: [N, 2] height and width, after EXIF rotation; 0 for broken ones.
        colour: whether any image has colour.
        pixels: uint8 [N, C, H, W] where all images are small, of one size and fit in memory; else None.
        groups: [N] group number; equal and nearly equal images share one, and so do those of one of the source's groups.
        problems: what was found.
        exact: [P, 2] pairs of equal images: each with the first that equals it.
        near: [Q, 2] pairs of nearly equal images, each the first of its equals.
    """

    good: np.ndarray
    sizes: np.ndarray
    colour: bool
    pixels: np.ndarray | None
    groups: np.ndarray
    problems: tuple[Problem, ...]
    exact: np.ndarray
    near: np.ndarray


class _ScannedImage(NamedTuple):
    size: tuple[int, int]
    pixels: np.ndarray
    thumbnail: np.ndarray
    digest: int
    error: ImageError | OSError | None
    info: ImageInfo | None = None


def scan_dataset(
    dataset: Dataset,
    *,
    damaged: str,
    near_duplicates: bool,
    memory_bytes: int,
    workers: int,
    channels: int = 0,
    cache: ScanCache | None = None,
    stats: FormatStats | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Decode every image once, or only those of which nothing is kept from an earlier look.

    Args:
        forms: what the files are is noted here; with it, near duplicates are looked for in slight crops too.
        kept: earlier looks, to which the new ones are added; where there are any, pixels do not stay in memory.
        channels: 3 or 1 fixes the pixel format; 0 takes grey when the first images all are.
        advance: called with the number done and the total, for a progress bar.
    """
    count = len(dataset.paths)
    mode = {3: "RGB", 1: "L", 0: None}[channels] or ("RGB" if has_colour(dataset) else "L")
    good = np.zeros(count, dtype=bool)
    sizes = np.zeros((count, 2), dtype=np.int32)
    thumbnails = np.zeros((count, THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    digests = np.zeros(count, dtype=np.uint64)
    pixels: np.ndarray | None = None
    keep, errors, rest = True, [], np.arange(count)
    if cache is not None:
        good, sizes, thumbnails, digests = cache.read()
        keep, rest = not good.any(), np.flatnonzero(~good)
    # A damaged file that is kept is named all the same.
    strict = dataset.strict()
    if stats is None:
        looks = ordered_map(lambda i: scan_image(dataset, strict, int(i), mode), rest, workers)
    else:
        looks = ordered_map(lambda i: scan_file(dataset, int(i), mode, stats.limit_pixels, damaged), rest, workers)
    for number, (index, look) in enumerate(zip(rest.tolist(), looks, strict=True)):
        if number % 256 == 0:
            advance(count - len(rest) + number, count)
        if look.info is not None and stats is not None:
            stats.note(index, look.info)
        if look.error is not None:
            errors.append((index, look.error))
        if look.size == (0, 0):
            continue
        good[index], sizes[index], thumbnails[index], digests[index] = True, look.size, look.thumbnail, look.digest
        if keep and pixels is None:
            keep = max(look.size) <= _SMALL_SIDE and count * look.pixels.nbytes <= memory_bytes
            pixels = np.zeros((count, *look.pixels.shape), dtype=np.uint8) if keep else None
        if pixels is not None and look.pixels.shape == pixels.shape[1:]:
            pixels[index] = look.pixels
        else:
            keep, pixels = False, None
    advance(count, count)
    if cache is not None:
        whole = np.setdiff1d(rest[good[rest]], [index for index, _ in errors])
        cache.add(whole, sizes[whole], thumbnails[whole], digests[whole])
    usable = np.flatnonzero(good)
    exact, near = duplicate_pairs(thumbnails[usable], digests[usable], near=near_duplicates)
    exact, near = usable[exact], usable[near]
    if stats is not None and near_duplicates:
        crops = cropped_pairs(dataset, np.setdiff1d(usable, exact[:, 1]), sizes, thumbnails, workers)
        near = np.unique(np.concatenate([near, crops]), axis=0)
    problems = [broken_image(dataset, index, error, damaged) for index, error in errors] + duplicate_warnings(
        dataset, exact, near
    )
    linked = group_numbers(count, exact, near, group_pairs(dataset.groups))
    return Scan(good, sizes, mode == "RGB", pixels, linked, tuple(problems), exact, near)


def scan_image(dataset: Dataset, strict: Dataset, index: int, mode: Literal["RGB", "L"]) -> _ScannedImage:
    """Decode one image and make what the scan needs of it.

    Args:
        strict: the same source, but refusing damaged files where `source` may keep them.
    """
    try:
        image, error = strict.read(index, mode), None
    except (ImageError, OSError) as found:
        error = found
        try:
            image = dataset.read(index, mode)
        except (ImageError, OSError):
            return _ScannedImage((0, 0), _NOTHING, _NOTHING, 0, error)
    return summarise(image, error)


def scan_file(
    dataset: Dataset, index: int, mode: Literal["RGB", "L"], limit_pixels: int, damaged: str
) -> _ScannedImage:
    """Look at one image and tell what its file is; an image that is an array has none."""
    place = dataset.location(index)
    if isinstance(dataset, ArrayDataset):
        return scan_image(dataset, dataset, index, mode)
    try:
        stored = place if isinstance(dataset, FileDataset) else dataset.encoded(index)
        image, info = read_described(stored, limit_pixels=limit_pixels)
    except OSError as error:
        return _ScannedImage((0, 0), _NOTHING, _NOTHING, 0, error)
    info = replace(info, path=place)
    error = None if info.verdict == "ok" else ImageError(info)
    if image is None or (error is not None and damaged != "keep"):
        return _ScannedImage((0, 0), _NOTHING, _NOTHING, 0, error, info)
    return summarise(image if image.mode == mode else image.convert(mode), error)._replace(info=info)


def summarise(image: PIL.Image.Image, error: ImageError | OSError | None) -> _ScannedImage:
    """Make of an image what the scan keeps of it."""
    width, height = image.size
    pixels = np.asarray(image)
    content = f"{width}x{height}".encode() + pixels.tobytes()
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    grey = image.convert("L")
    if image.size != (THUMBNAIL, THUMBNAIL):
        grey = grey.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    if max(width, height) > _SMALL_SIDE:
        pixels = _NOTHING
    elif pixels.ndim == 2:
        pixels = pixels[None]
    else:
        pixels = pixels.transpose(2, 0, 1)
    return _ScannedImage((height, width), pixels, np.asarray(grey), digest, error)


def has_colour(dataset: Dataset) -> bool:
    """Whether any of a sample of images, spread over the source, has colour."""
    for index in np.linspace(0, len(dataset.paths) - 1, _SAMPLE).astype(int):
        try:
            red, green, blue = dataset.read(int(index), "RGB").split()
        except (ImageError, OSError):
            continue
        if red.tobytes() != green.tobytes() or green.tobytes() != blue.tobytes():
            return True
    return False


def duplicate_warnings(dataset: Dataset, exact: np.ndarray, near: np.ndarray) -> list[Problem]:
    """Describe duplicates: across parts they leak, across labels they contradict, else they are only counted."""
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
            (across, "leak", f"{word} is in two parts of the dataset"),
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


_NOTHING = np.zeros(0, dtype=np.uint8)
