"""Everything that can be said about a dataset before a training: what `vitrail check` writes."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.config import DataConfig
from vitrail.data.check.class_names import label_problems, level_problem
from vitrail.data.check.crop_duplicates import LIMIT
from vitrail.data.check.duplicates import duplicate_pairs, group_numbers
from vitrail.data.check.image_formats import FormatStats, format_problems
from vitrail.data.check.scan import Scan, ScanSettings, scan_dataset
from vitrail.data.datasets.base import ArrayDataset, Dataset, FileDataset, broken_image
from vitrail.data.datasets.folder import open_image_folder
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.webdataset.shards import is_shards
from vitrail.data.images.decode import ImageError, inspect_image
from vitrail.data.problems import Problem
from vitrail.data.progress import Advance, Bar, no_bar
from vitrail.data.splits.splits import check_trainable, class_problems, split_dataset
from vitrail.lookup import shorten
from vitrail.threads import ordered_map

_BROKEN = ("unreadable", "damaged", "refused")


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        dataset: the listed images; None where nothing could be listed.
        facts: what JSON holds besides `ok` and `problems`.
        problems: errors first.
    """

    dataset: Dataset | None
    facts: dict[str, Any]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether no error was found; warnings may have been."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"ok": self.ok, **self.facts, "problems": [problem.to_dict() for problem in self.problems]}


def check_dataset(config: DataConfig, *, quick: bool = False, bar: Bar = no_bar) -> CheckResult:
    """Look for everything that is known to spoil a training or its evaluation.

    Args:
        quick: read headers and bytes and decode nothing: images that end too early, equal images in different files
            and near duplicates are not found.
        bar: gives a context with a function of the number done and the total, such as `Console.bar`.
    """
    started = time.perf_counter()
    form = "quick" if quick else "full"
    root = Path(config.source).expanduser()
    in_folders = root.is_dir() and not is_shards(config.source)
    level = level_problem(root) if in_folders else None
    if level is not None and level.severity == "error":
        return CheckResult(None, {"num_images": 0, "classes": {}, "form": form}, (level,))
    try:
        dataset = list_with_all_classes(config, root, bar)
    except ValueError as error:
        if not in_folders:
            raise
        problem = Problem("error", "missing-class", (), str(error))
        return CheckResult(None, {"num_images": 0, "classes": {}, "form": form}, (problem,))
    with bar(f"scanning {len(dataset.paths):,} images") as advance:
        scan = quick_scan(dataset, config, advance) if quick else full_scan(dataset, config, advance)
    problems = [*([level] if level else []), *dataset.problems, *label_problems(dataset.labels)]
    problems += [problem for problem in scan.problems if problem.kind in _BROKEN]
    problems += duplicate_problems(dataset, scan)
    problems += format_problems(dataset, scan.formats, scan.sizes)
    facts = check_facts(dataset, scan) | {"form": form, "near_duplicates": not quick and config.near_duplicates}
    facts["num_cached"] = scan.num_cached
    facts["crops_compared"] = facts["near_duplicates"] and len(dataset.paths) <= LIMIT
    try:
        splits = split_dataset(dataset, config, scan.good, scan.groups)
        facts |= {"fingerprint": splits.fingerprint, "rule": splits.rule}
        facts["splits"] = {split: len(indices) for split, indices in splits.indices.items()}
        named = {Path(path).name for each in dataset.problems if each.kind == "missing-class" for path in each.paths}
        problems += [
            each for each in class_problems(dataset, splits) if each.kind != "missing-class" or set(each.paths) - named
        ]
        check_trainable(dataset, splits)
    except ValueError as error:  # what training would stop at
        problems.append(Problem("error", "missing-class", (), str(error)))
    facts["seconds"] = round(time.perf_counter() - started, 2)
    return CheckResult(dataset, facts, tuple(sorted(problems, key=lambda problem: problem.severity)))


def list_with_all_classes(config: DataConfig, root: Path, bar: Bar) -> Dataset:
    """List the images; classes that only some splits have are listed too, where training would refuse them."""
    if root.is_dir() and not is_shards(config.source):
        damaged = "keep" if config.damaged == "keep" else "refuse"
        return open_image_folder(root, limit_pixels=config.limit_pixels, damaged=damaged, all_classes=True)
    return open_dataset(config.source, limit_pixels=config.limit_pixels, keep_damaged=config.damaged == "keep", bar=bar)


def full_scan(dataset: Dataset, config: DataConfig, advance: Advance) -> Scan:
    """Decode every image that the cache does not know."""
    settings = ScanSettings(
        damaged=config.damaged,
        near_duplicates=config.near_duplicates,
        limit_pixels=config.limit_pixels,
        crops=True,
        workers=config.workers,
    )
    return scan_dataset(dataset, settings, advance=advance)


def quick_scan(dataset: Dataset, config: DataConfig, advance: Advance) -> Scan:
    """Read every header, and compare files byte by byte; images that are arrays are compared by their pixels."""

    def inspect(index: int) -> tuple[Any, int, ImageError | OSError | None]:
        try:
            if isinstance(dataset, ArrayDataset):
                content, info = dataset.read(index, "RGB").tobytes(), None
            else:
                location = dataset.location(index)
                stored = location if isinstance(dataset, FileDataset) else dataset.encoded(index)
                info = replace(inspect_image(stored, limit_pixels=config.limit_pixels, decode=False), path=location)
                with open(location, "rb") if isinstance(stored, str) else io.BytesIO(stored) as file:
                    content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
        except (ImageError, OSError) as error:
            return None, 0, error
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        return info, digest, ImageError(info) if info is not None and info.verdict != "ok" else None

    count = len(dataset.paths)
    stats = FormatStats(count, config.limit_pixels)
    good, digests = np.zeros(count, dtype=bool), np.zeros(count, dtype=np.uint64)
    sizes, problems = np.zeros((count, 2), dtype=np.int32), []
    for index, (info, digest, error) in enumerate(ordered_map(inspect, range(count), config.workers)):
        if index % 256 == 0:
            advance(index, count)
        if info is not None:
            stats.note(index, info)
            sizes[index] = info.height, info.width
        if error is not None:
            problems.append(broken_image(dataset, index, error, config.damaged))
            continue
        good[index], digests[index] = True, digest
    advance(count, count)
    usable = np.flatnonzero(good)
    exact = usable[duplicate_pairs(np.zeros((len(usable), 0, 0), np.uint8), digests[usable], near=False)[0]]
    near = np.empty((0, 2), dtype=np.int64)
    return Scan(
        good=good,
        sizes=sizes,
        colour=True,
        pixels=None,
        loaded=np.zeros(count, dtype=bool),
        groups=group_numbers(count, exact, near),
        problems=tuple(problems),
        exact=exact,
        near=near,
        formats=stats,
    )


def check_facts(dataset: Dataset, scan: Scan) -> dict[str, Any]:
    """Return counts and sizes as JSON values."""
    found = np.bincount(dataset.targets, minlength=len(dataset.labels))
    facts: dict[str, Any] = {
        "num_images": len(dataset.paths),
        "num_good": int(scan.good.sum()),
        "classes": dict(zip(dataset.labels, found.tolist(), strict=True)),
        "modes": scan.formats.counts("modes"),
        "formats": scan.formats.counts("formats"),
    }
    sizes = scan.sizes[scan.good & (scan.sizes.min(axis=1) > 0)]
    if len(sizes):
        pixels = sizes.prod(axis=1, dtype=np.int64)
        named = {"smallest": int(pixels.argmin()), "largest": int(pixels.argmax())}
        facts["sizes"] = {name: sizes[at, ::-1].tolist() for name, at in named.items()}  # width, height
        facts["sizes"]["median"] = np.median(sizes[:, ::-1], axis=0).astype(int).tolist()
    return facts


def duplicate_problems(dataset: Dataset, scan: Scan) -> list[Problem]:
    """Describe each group of equal or nearly equal images.

    The same image in two splits or under two labels is an error: a figure, or a label, is certainly wrong. For nearly
    equal ones a person must look: it may be a copy, or the next image of a series.
    """
    problems: list[Problem] = []
    fate = "Training and validation never get one each" if dataset.split is None else "It counts as often"
    for pairs, same in ((scan.exact, True), (scan.near, False)):
        for members in grouped(pairs):
            labels = [dataset.labels[each] for each in dict.fromkeys(dataset.targets[members].tolist())]
            splits_met = [] if dataset.split is None else list(dict.fromkeys(dataset.split[members].tolist()))
            paths = tuple(dataset.paths[index] for index in members)
            what = "the same image is" if same else "nearly the same image is"
            severity = "error" if same else "warning"
            names = shorten(paths, most=3)
            if len(splits_met) > 1:
                text = f"{what} in {' and '.join(splits_met)}: {names}. Keep it in one split, or the evaluation is too good"
                problems.append(Problem(severity, "leak", paths, text))
            if len(labels) > 1:
                text = f"{what} in the classes {' and '.join(map(repr, labels))}: {names}. Keep the right one"
                problems.append(Problem(severity, "label-conflict", paths, text))
            if len(splits_met) < 2 and len(labels) < 2:
                kind = "duplicate" if same else "near-duplicate"
                text = f"{what} there {len(paths)} times: {names}. {fate}"
                problems.append(Problem("warning", kind, paths, text))
    return problems


def grouped(pairs: np.ndarray) -> list[list[int]]:
    """Return the images that pairs [P, 2] link, group by group, ascending."""
    members, positions = np.unique(pairs, return_inverse=True)
    numbers = group_numbers(len(members), positions.reshape(-1, 2))
    found: dict[int, list[int]] = {}
    for each, group in zip(members.tolist(), numbers.tolist(), strict=True):
        found.setdefault(group, []).append(each)
    return list(found.values())
