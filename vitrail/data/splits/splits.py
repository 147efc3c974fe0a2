"""Which image is in which part, decided once and recorded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vitrail.config import UNEVEN, DataConfig
from vitrail.data.datasets.base import SPLIT_BY_FOLDERS, Dataset
from vitrail.data.datasets.string_array import positions_of
from vitrail.data.problems import Problem
from vitrail.data.splits.kfold import fold_numbers, fold_problems, ordered_by_group
from vitrail.files import write_text


@dataclass(frozen=True)
class Splits:
    """The division of a source.

    Attributes:
        parts: part name → indices of its images, ascending. `test` never chooses a model.
        fingerprint: hash of which file, with which label, is in which part.
        rule: how the division came about, for people.
        problems: what was found wrong while dividing.
    """

    indices: dict[str, np.ndarray]
    fingerprint: str
    rule: str
    problems: tuple[Problem, ...] = ()


def split_dataset(dataset: Dataset, config: DataConfig, good: np.ndarray, groups: np.ndarray) -> Splits:
    """Divide a source: its own parts where it has them, else a stratified split.

    Images of one group (duplicates, or what the source calls a group) stay on one side. Images that are not `good` are in no part.

    With `data.folds`, one fold of what is not the test split becomes the validation split.

    Raises:
        ValueError: there are to be folds, but the source has a validation split of its own.
    """
    usable = np.flatnonzero(good)
    mark = "/" if dataset.split_origin == SPLIT_BY_FOLDERS else ""
    if dataset.split is None:
        pool, parts, rule = usable, {}, "a stratified split of all images"
    else:
        parts = {name: usable[dataset.split[usable] == name] for name in dict.fromkeys(dataset.split.tolist())}
        pool, rule = (
            parts.get("train", usable[:0]),
            f"{dataset.split_origin} " + ", ".join(name + mark for name in parts),
        )
    if config.folds and "val" in parts:
        raise ValueError(
            f"{dataset.name}: data.folds {config.folds} makes validation splits of the training images, but {dataset.split_origin} "
            f"name one already (val{mark}); move its images into train{mark}, or leave data.folds out"
        )
    wanted = {
        "test": 0.0 if "test" in parts else config.test_fraction,
        "val": 0.0 if "val" in parts or config.folds else config.val_fraction,
    }
    problems: list[Problem] = []
    if dataset.split is None or "train" in parts:
        left = 1.0
        for name, fraction in wanted.items():
            taken = stratified(pool, dataset.targets, groups, fraction / left, config.split_seed)
            if len(taken):
                parts[name], pool, left = taken, np.setdiff1d(pool, taken), left - fraction
                rule += f"; {name}: a stratified {fraction:.0%} of train{mark}" if dataset.split is not None else ""
        if config.folds:
            numbers = fold_numbers(pool, dataset.targets, groups, config.folds, config.split_seed)
            refuse_empty(dataset, numbers, groups[pool], config.folds)
            problems = fold_problems(dataset.labels, dataset.targets[pool], numbers, config.folds)
            parts["val"], pool = pool[numbers == config.fold], pool[numbers != config.fold]
            rule += f"; val: fold {config.fold} of {config.folds} (from 0), stratified"
        parts["train"] = pool
    if dataset.groups is not None and ("stratified" in rule):
        rule += f"; {len(np.unique(dataset.groups[dataset.groups >= 0])):,} groups kept whole"
    parts = {name: parts[name] for name in ("train", "val", "test") if name in parts and len(parts[name])}
    return Splits(parts, fingerprint(dataset, parts), rule, tuple(problems))


def refuse_empty(dataset: Dataset, numbers: np.ndarray, groups: np.ndarray, folds: int) -> None:
    """Raise a ValueError when a fold would have nothing to evaluate, before any of them is trained."""
    empty = folds - len(np.unique(numbers[numbers >= 0]))
    if empty:
        what = f"{len(numbers):,} images in {len(np.unique(groups)):,} groups (an image alone is one)"
        raise ValueError(
            f"data.folds is {folds}, but {empty} of them would have no image: {dataset.name} has {what}; lower data.folds"
        )


def stratified(pool: np.ndarray, targets: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Take about `fraction` of every class from `pool`, whole groups at a time; at least one image of each class
    that has two or more, and never a class's only image."""
    if fraction == 0.0:
        return pool[:0]
    random = np.random.Generator(np.random.Philox(key=seed))
    order = random.permutation(pool)
    # A group that spans classes (the same image under two labels) is taken or left with the class it is met in first.
    members, starts = ordered_by_group(order, groups)
    sizes = np.bincount(targets[pool])
    quota = np.where(sizes > 1, np.clip(np.round(sizes * fraction), 1, np.maximum(sizes - 1, 1)), 0).astype(int)
    taken = np.zeros(len(starts) - 1, dtype=bool)
    filled, limits = [0] * len(quota), quota.tolist()  # Python's own numbers: a million steps, most of one image
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
    """Take groups of several images that do not fit into what their classes should give, where that is better.

    Args:
        taken: which groups are taken; changed in place.
        filled, quota, sizes: of each class, how many images are taken, should be, and there are.
        classes: the class of every image, group after group.
        starts: where each group begins, and the end.
    """
    several = np.flatnonzero(np.diff(starts) > 1)
    counts = {group: classes[starts[group] : starts[group + 1]] for group in several.tolist()}

    def take(group: int, *, if_nearer: bool) -> bool:
        more = filled + np.bincount(counts[group], minlength=len(quota))
        fits = (more < np.maximum(sizes, 1)).all()
        if not fits or (if_nearer and distance_to_quota(more, quota) >= distance_to_quota(filled, quota)):
            return False
        taken[group], filled[:] = True, more
        return True

    # Where large groups leave a gap that none fits into, one that overshoots may still bring the sizes nearer.
    for group in several[~taken[several]].tolist():
        take(group, if_nearer=True)
    # A class whose groups are all larger than its share gives its smallest, if that leaves it an image.
    for label in np.flatnonzero((quota > 0) & (filled == 0)):
        if not filled[label]:
            own = [group for group, each in counts.items() if label in each]
            for group in sorted(own, key=lambda each: len(counts[each])):
                if take(group, if_nearer=False):
                    break


def distance_to_quota(filled: np.ndarray, quota: np.ndarray) -> int:
    """Return how far a part is from what it should have of each class, and in all."""
    return int(np.abs(filled - quota).sum() + abs(filled.sum() - quota.sum()))


def fingerprint(dataset: Dataset, parts: dict[str, np.ndarray]) -> str:
    """Hash which file, with which label, is in which part; independent of listing order."""
    lines = [
        f"{part}\t{dataset.paths[index]}\t{dataset.labels[dataset.targets[index]]}\n"
        for part, indices in parts.items()
        for index in indices
    ]
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def check_trainable(dataset: Dataset, splits: Splits, *, evaluated: str = "val") -> list[Problem]:
    """Return what training should say of the parts; what makes training or its evaluation impossible raises.

    Args:
        evaluated: the part that the evaluation cannot do without.

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
            why += "; groups are never divided, and one that holds a whole class must be trained on"
        raise ValueError(f"{dataset.name}: no images for validation ({len(train)} for training); {why}")
    return [*splits.problems, *class_problems(dataset, splits)]


def class_problems(dataset: Dataset, splits: Splits) -> list[Problem]:
    """Describe classes that a part lacks, that have few images, or that are very uneven."""
    counts = np.bincount(
        dataset.targets[splits.indices.get("train", np.zeros(0, dtype=np.int64))], minlength=len(dataset.labels)
    )
    problems = []
    for part in ("val", "test"):
        if part in splits.indices:
            present = np.bincount(dataset.targets[splits.indices[part]], minlength=len(dataset.labels))
            gone = tuple(dataset.labels[i] for i in np.flatnonzero(present == 0))
            if gone:
                text = f"{part} has no image of {len(gone)} classes: {', '.join(gone[:10])}"
                problems.append(Problem("warning", "missing-class", gone, text))
    small = tuple(dataset.labels[i] for i in np.flatnonzero((counts > 0) & (counts < 10)))
    if small:
        text = f"{len(small)} classes have fewer than 10 training images: {', '.join(small[:10])}"
        problems.append(Problem("warning", "small-class", small, text))
    if counts.max() >= UNEVEN * max(counts.min(), 1):
        text = f"classes are uneven: {counts.min()} to {counts.max()} training images"
        problems.append(Problem("warning", "imbalance", (), text))
    return problems


def save_splits(dataset: Dataset, splits: Splits, path: Path) -> None:
    """Write the division: part → paths, with its fingerprint and rule."""
    parts = {name: [dataset.paths[index] for index in indices] for name, indices in splits.indices.items()}
    content = {"fingerprint": splits.fingerprint, "rule": splits.rule, "source": dataset.name, "splits": parts}
    write_text(path, json.dumps(content) + "\n")  # ASCII: a name that is not Unicode has no UTF-8


def load_splits(dataset: Dataset, path: Path, good: np.ndarray | None = None) -> Splits:
    """Read a division back and find its images in the source.

    Args:
        good: [N] whether each image can be used, where that is known.

    Raises:
        ValueError: a recorded image is gone from the source, is broken, or has another label now.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = {}
    for part, names in content["splits"].items():
        parts[part] = positions_of(dataset.paths, names)
        gone = np.flatnonzero(parts[part] < 0)
        if len(gone):
            raise ValueError(
                f"{dataset.name}: {len(gone)} images of the recorded {part} split are gone, for instance "
                f"{names[gone[0]]} (recorded in {path}); restore them, or train anew"
            )
        broken = parts[part][~good[parts[part]]] if good is not None else parts[part][:0]
        if len(broken):
            raise ValueError(
                f"{dataset.name}: {len(broken)} images of the recorded {part} split are broken now, for instance "
                f"{dataset.paths[broken[0]]} (recorded in {path}); restore them, or train anew"
            )
    if fingerprint(dataset, parts) != content["fingerprint"]:
        raise ValueError(f"{dataset.name}: the labels of images have changed since {path} was written; train anew")
    return Splits(parts, content["fingerprint"], content["rule"])
