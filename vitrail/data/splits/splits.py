"""Assign each image to a split, train, val or test, once, and record it in `split.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vitrail.config import UNEVEN, DataConfig
from vitrail.data.datasets.base import SPLIT_BY_FOLDERS, SPLITS, Dataset
from vitrail.data.datasets.string_array import positions_of
from vitrail.data.problems import Problem
from vitrail.data.splits.kfold import fold_numbers, fold_problems, ordered_by_group
from vitrail.files import write_text


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset.

    Attributes:
        indices: split name → indices of its images, ascending. `test` never chooses a model.
        fingerprint: hash of which file, with which label, is in which split.
        rule: how the splits were made, for people.
        problems: those found in splitting.
    """

    indices: dict[str, np.ndarray]
    fingerprint: str
    rule: str
    problems: tuple[Problem, ...] = ()


def split_dataset(dataset: Dataset, config: DataConfig, good: np.ndarray, groups: np.ndarray) -> Splits:
    """Split a dataset: by its own splits where it has them, else by a stratified split.

    Images of one group (duplicates, or a group of the dataset) are in the same split. Images that are not `good` are in
    no split. With `data.folds`, one fold of what is not the test split becomes the validation split.

    Raises:
        ValueError: `data.folds` is set, but the dataset has a validation split of its own.
    """
    usable = np.flatnonzero(good)
    mark = "/" if dataset.split_origin == SPLIT_BY_FOLDERS else ""
    if dataset.split is None:
        pool, splits, rule = usable, {}, "a stratified split of all images"
    else:
        splits = {name: usable[dataset.split[usable] == name] for name in dict.fromkeys(dataset.split.tolist())}
        pool, rule = (
            splits.get("train", usable[:0]),
            f"{dataset.split_origin} " + ", ".join(name + mark for name in splits),
        )
    if config.folds and "val" in splits:
        raise ValueError(
            f"{dataset.name}: data.folds {config.folds} makes validation splits of the training images, but {dataset.split_origin} "
            f"name one already (val{mark}); move its images into train{mark}, or leave data.folds out"
        )
    fractions = {
        "test": 0.0 if "test" in splits else config.test_fraction,
        "val": 0.0 if "val" in splits or config.folds else config.val_fraction,
    }
    problems: list[Problem] = []
    if dataset.split is None or "train" in splits:
        left = 1.0
        for name, fraction in fractions.items():
            taken = stratified(pool, dataset.targets, groups, fraction / left, config.split_seed)
            if len(taken):
                splits[name], pool, left = taken, np.setdiff1d(pool, taken), left - fraction
                rule += f"; {name}: a stratified {fraction:.0%} of train{mark}" if dataset.split is not None else ""
        if config.folds:
            numbers = fold_numbers(pool, dataset.targets, groups, config.folds, config.split_seed)
            check_no_empty_fold(dataset, numbers, groups[pool], config.folds)
            problems = fold_problems(dataset.labels, dataset.targets[pool], numbers, config.folds)
            splits["val"], pool = pool[numbers == config.fold], pool[numbers != config.fold]
            rule += f"; val: fold {config.fold} of {config.folds} (from 0), stratified"
        splits["train"] = pool
    if dataset.groups is not None and ("stratified" in rule):
        rule += f"; {len(np.unique(dataset.groups[dataset.groups >= 0])):,} groups kept whole"
    splits = {name: splits[name] for name in SPLITS if name in splits and len(splits[name])}
    return Splits(splits, fingerprint(dataset, splits), rule, tuple(problems))


def check_no_empty_fold(dataset: Dataset, numbers: np.ndarray, groups: np.ndarray, folds: int) -> None:
    """Raise a ValueError when a fold would have no image to evaluate, before any fold is trained."""
    empty = folds - len(np.unique(numbers[numbers >= 0]))
    if empty:
        size = f"{len(numbers):,} images in {len(np.unique(groups)):,} groups (an image alone is one)"
        raise ValueError(
            f"data.folds is {folds}, but {empty} of them would have no image: {dataset.name} has {size}; lower data.folds"
        )


def stratified(pool: np.ndarray, targets: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return about `fraction` of every class from `pool`, in whole groups, ascending.

    At least one image is taken of each class that has two or more, and never the only image of a class.
    """
    if fraction == 0.0:
        return pool[:0]
    random = np.random.Generator(np.random.Philox(key=seed))
    order = random.permutation(pool)
    # A group that spans classes (the same image under two labels) goes with its first class in the random order.
    members, starts = ordered_by_group(order, groups)
    sizes = np.bincount(targets[pool])
    quota = np.where(sizes > 1, np.clip(np.round(sizes * fraction), 1, np.maximum(sizes - 1, 1)), 0).astype(int)
    taken = np.zeros(len(starts) - 1, dtype=bool)
    filled, limits = [0] * len(quota), quota.tolist()  # Python's own integers: a million steps, most of one image
    classes, bounds = targets[members].tolist(), starts.tolist()
    for group, (start, stop) in enumerate(pairwise(bounds)):
        own = classes[start:stop]
        if all(filled[label] + own.count(label) <= limits[label] for label in own):
            taken[group] = True
            for label in own:
                filled[label] += 1
    add_large_groups(taken, np.asarray(filled), quota, sizes, targets[members], starts)
    return np.sort(members[np.repeat(taken, np.diff(starts))])


def add_large_groups(
    taken: np.ndarray, filled: np.ndarray, quota: np.ndarray, sizes: np.ndarray, classes: np.ndarray, starts: np.ndarray
) -> None:
    """Take groups of several images that do not fit into their classes' quota, where that comes nearer to it.

    Args:
        taken: which groups are taken; changed in place.
        filled, quota, sizes: for each class, how many images are taken, should be taken, and exist.
        classes: the class of every image, group after group.
        starts: where each group begins, and the end.
    """
    large = np.flatnonzero(np.diff(starts) > 1)
    counts = {group: classes[starts[group] : starts[group + 1]] for group in large.tolist()}

    def take(group: int, *, if_nearer: bool) -> bool:
        more = filled + np.bincount(counts[group], minlength=len(quota))
        fits = (more < np.maximum(sizes, 1)).all()
        if not fits or (if_nearer and distance_to_quota(more, quota) >= distance_to_quota(filled, quota)):
            return False
        taken[group], filled[:] = True, more
        return True

    # Where large groups leave a gap that none fits into, one that overshoots may still bring the sizes nearer.
    for group in large[~taken[large]].tolist():
        take(group, if_nearer=True)
    # A class whose groups are all larger than its share gives its smallest, if that leaves it an image.
    for label in np.flatnonzero((quota > 0) & (filled == 0)):
        if not filled[label]:
            own = [group for group, classes_of_group in counts.items() if label in classes_of_group]
            for group in sorted(own, key=lambda group: len(counts[group])):
                if take(group, if_nearer=False):
                    break


def distance_to_quota(filled: np.ndarray, quota: np.ndarray) -> int:
    """Return the distance of a split from its quota: in images of each class, and in all."""
    return int(np.abs(filled - quota).sum() + abs(filled.sum() - quota.sum()))


def fingerprint(dataset: Dataset, splits: dict[str, np.ndarray]) -> str:
    """Return a hash of which file, with which label, is in which split; independent of the order of listing."""
    lines = [
        f"{split}\t{dataset.paths[index]}\t{dataset.labels[dataset.targets[index]]}\n"
        for split, indices in splits.items()
        for index in indices
    ]
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def check_trainable(dataset: Dataset, splits: Splits, *, evaluated: str = "val") -> list[Problem]:
    """Return the problems of the splits that training should warn of.

    Args:
        evaluated: the split that the evaluation cannot do without.

    Raises:
        ValueError: fewer than two classes, or no images to train on or to evaluate by.
    """
    train = splits.indices.get("train", np.zeros(0, dtype=np.int64))
    if len(dataset.labels) == 1:
        raise ValueError(f"{dataset.name}: only one class ({dataset.labels[0]!r}); a classifier needs at least two")
    counts = np.bincount(dataset.targets[train], minlength=len(dataset.labels))
    if not len(train) or (counts == 0).any():
        empty = [dataset.labels[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(f"{dataset.name}: no images to train on for {len(empty)} classes: {', '.join(empty[:10])}")
    if evaluated not in splits.indices:
        why = "add val/ folders, more images (at least two a class), or raise --data.val_fraction"
        if dataset.groups is not None:
            why += "; groups are never split, and one that holds a whole class must be trained on"
        raise ValueError(f"{dataset.name}: no images for validation ({len(train)} for training); {why}")
    return [*splits.problems, *class_problems(dataset, splits)]


def class_problems(dataset: Dataset, splits: Splits) -> list[Problem]:
    """Return the problems of classes that a split lacks, that have few images, or that are very uneven."""
    counts = np.bincount(
        dataset.targets[splits.indices.get("train", np.zeros(0, dtype=np.int64))], minlength=len(dataset.labels)
    )
    problems = []
    for split in ("val", "test"):
        if split in splits.indices:
            present = np.bincount(dataset.targets[splits.indices[split]], minlength=len(dataset.labels))
            missing = tuple(dataset.labels[i] for i in np.flatnonzero(present == 0))
            if missing:
                text = f"{split} has no image of {len(missing)} classes: {', '.join(missing[:10])}"
                problems.append(Problem("warning", "missing-class", missing, text))
    small = tuple(dataset.labels[i] for i in np.flatnonzero((counts > 0) & (counts < 10)))
    if small:
        text = f"{len(small)} classes have fewer than 10 training images: {', '.join(small[:10])}"
        problems.append(Problem("warning", "small-class", small, text))
    if counts.max() >= UNEVEN * max(counts.min(), 1):
        text = f"classes are uneven: {counts.min()} to {counts.max()} training images"
        problems.append(Problem("warning", "imbalance", (), text))
    return problems


def save_splits(dataset: Dataset, splits: Splits, path: Path) -> None:
    """Write `split.json`: split → paths, with the fingerprint and the rule."""
    paths = {name: [dataset.paths[index] for index in indices] for name, indices in splits.indices.items()}
    content = {"fingerprint": splits.fingerprint, "rule": splits.rule, "source": dataset.name, "splits": paths}
    write_text(path, json.dumps(content) + "\n")  # ASCII: a name that is not Unicode has no UTF-8


def load_splits(dataset: Dataset, path: Path, good: np.ndarray | None = None) -> Splits:
    """Read a `split.json` and find its images in the dataset.

    Args:
        good: [N] whether each image can be used, where that is known.

    Raises:
        ValueError: a recorded image is gone from the dataset, is broken, or has another label now.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    splits = {}
    for split, names in content["splits"].items():
        splits[split] = positions_of(dataset.paths, names)
        gone = np.flatnonzero(splits[split] < 0)
        if len(gone):
            raise ValueError(
                f"{dataset.name}: {len(gone)} images of the recorded {split} split are gone, for instance "
                f"{names[gone[0]]} (recorded in {path}); restore them, or train anew"
            )
        broken = splits[split][~good[splits[split]]] if good is not None else splits[split][:0]
        if len(broken):
            raise ValueError(
                f"{dataset.name}: {len(broken)} images of the recorded {split} split are broken now, for instance "
                f"{dataset.paths[broken[0]]} (recorded in {path}); restore them, or train anew"
            )
    if fingerprint(dataset, splits) != content["fingerprint"]:
        raise ValueError(f"{dataset.name}: the labels of images have changed since {path} was written; train anew")
    return Splits(splits, content["fingerprint"], content["rule"])
