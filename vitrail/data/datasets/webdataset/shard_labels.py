"""From what each shard says to one source: classes, parts and groups over all of them, which must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS, TarDataset, TarShard, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.datasets.table import torn_groups
from vitrail.data.datasets.webdataset.shard_index import ClassMarks, ShardIndex
from vitrail.data.problems import Problem
from vitrail.lookup import unknown

BY_JSON, BY_NAME, BY_FOLDER = "the split in .json:", "the names of the shards:", "the folders in the shards:"


class ClassNames(NamedTuple):
    """What is written beside the shards: class names in class order, and why images must not be mirrored."""

    names: tuple[str, ...]
    flip_reason: str


class _Together:
    """The indexes of all shards, one after the other."""

    def __init__(self, shards: Sequence[TarShard], indexes: Sequence[ShardIndex]) -> None:
        self.shards, self.indexes = shards, indexes
        self.counts = np.asarray([len(index.paths) for index in indexes])
        self.firsts = np.cumsum(self.counts) - self.counts
        self.starts, self.sizes, self.splits = (self.whole(each) for each in ("starts", "sizes", "splits"))
        self.weights = self.whole("weights")
        said: dict[ClassMarks, int] = {}
        groups: dict[str, int] = {}
        self.codes = np.concatenate([renumbered(each.codes, each.marks, said) for each in indexes])
        self.groups = np.concatenate([renumbered(each.groups, each.group_names, groups) for each in indexes])
        self.said, self.group_names = list(said), list(groups)

    def whole(self, name: str) -> np.ndarray:
        """Return one array of all shards."""
        return np.concatenate([np.asarray(getattr(index, name)) for index in self.indexes])

    def fault(self, index: int, text: str) -> ValueError:
        """Return an error about an image."""
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        inside = self.indexes[number].paths[index - int(self.firsts[number])]
        return ValueError(f"{self.shards[number].word}: {inside}: {text}")

    def first(self, code: int) -> int:
        """Return the first image of which something is said."""
        return int(np.argmax(self.codes == code))


def renumbered(codes: np.ndarray, names: Sequence, all_names: dict) -> np.ndarray:
    """Return numbers of names as numbers in `all_names`, to which new names are added; -1 stays."""
    numbers = np.asarray([all_names.setdefault(name, len(all_names)) for name in names] + [-1], dtype=np.int32)
    return numbers[np.asarray(codes)]


def join_shards(
    name: str,
    shards: Sequence[TarShard],
    indexes: Sequence[ShardIndex],
    *,
    classes: ClassNames | None,
    parts: Sequence[int],
    limit_pixels: int,
    damaged: Literal["refuse", "keep"],
) -> TarDataset:
    """Make one source of shards.

    Args:
        classes: what is written beside the shards, where it is.
        parts: for each shard the number in `SPLITS` that its name tells, -1 for none.

    Raises:
        ValueError: samples contradict each other, or some lack what others have.
    """
    whole = _Together(shards, indexes)
    folder_splits, names = class_names_of(whole, classes and classes.names)
    split, split_origin = splits_of_shards(whole, parts, folder_splits)
    labels, targets = classes_of_shards(whole, names, classes and classes.names, split)
    grouped = bool((whole.groups >= 0).any())
    problems = torn_groups(whole.group_names, split, whole.groups) if grouped and split is not None else []
    if unread := sorted({each for index in indexes for each in index.unread}):
        problems.append(Problem("warning", "name", tuple(unread), f"{name}: not read: {', '.join(unread[:10])}"))
    paths = StringArray()
    for shard, index in zip(shards, indexes, strict=True):
        paths.extend(f"{shard.stem}/{each}" for each in index.paths)
    return TarDataset(
        name=name,
        labels=labels,
        paths=paths,
        targets=targets,
        split=None if split is None else np.asarray(SPLITS)[split],
        groups=whole.groups if grouped else None,
        weights=weights_of(whole),
        split_origin=split_origin,
        problems=tuple(problems),
        flip_reason=(classes.flip_reason if classes else "") or flip_reason(labels),
        shards=tuple(shards),
        firsts=whole.firsts,
        starts=whole.starts,
        sizes=whole.sizes,
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def weights_of(whole: _Together) -> np.ndarray | None:
    """Return what each image counts in the loss, None where nothing is said of it.

    Raises:
        ValueError: it is said of some images only.
    """
    silent = np.isnan(whole.weights)
    if silent.all():
        return None
    if silent.any():
        raise whole.fault(
            int(np.argmax(silent)), "has no weight in its .json, but others have; write it in all or in none"
        )
    return whole.weights


def class_names_of(whole: _Together, classes: tuple[str, ...] | None) -> tuple[np.ndarray | None, list[str]]:
    """Return the class's name for each different thing that is said of it, and parts where folders tell them.

    Raises:
        ValueError: labels are read in different places, or .cls and .json of one sample disagree.
    """
    kinds = [said.kind for said in whole.said]
    odd = next((code for code, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise whole.fault(
            whole.first(odd),
            f"its label is told by {kinds[odd]}, those of others by {kinds[0]}; write it in one way in all samples",
        )
    if kinds[0] == "folder":
        return by_folder([said.folder for said in whole.said])
    names, written = [], {}
    for code, said in enumerate(whole.said):
        told = number_name(said.cls, classes)
        if told is None:
            raise whole.fault(
                whole.first(code),
                f"class {said.cls} in its .cls, but classes.json has {len(classes or ())} names, from 0",
            )
        # Without classes.json, a number may stand for a name, but always for the same one.
        same = not said.label or not said.cls or told == said.label
        if not same and classes is None and said.cls.isdecimal():
            same = written.setdefault(said.cls, said.label) == said.label
        if not same:
            raise whole.fault(
                whole.first(code),
                f"its .cls says {said.cls} ({written.get(said.cls, told)!r}), its .json {said.label!r}; mend one of them",
            )
        names.append(said.label or told)
    return None, names


def number_name(cls: str, classes: tuple[str, ...] | None) -> str | None:
    """Return the class's name that a .cls means; None for a number that there is no name for."""
    if classes is None or not cls.isdecimal():
        return cls
    return classes[int(cls)] if int(cls) < len(classes) else None


def by_folder(folders: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Return parts and classes by the folders of images in their tars.

    As in folders on disk, the first level is the class, below train/ val/ test/ where all lie in such; folders above,
    in which all images lie, do not count.
    """
    levels = [folder.split("/") for folder in folders]
    while (
        min(map(len, levels)) > 1 and len({each[0] for each in levels}) == 1 and levels[0][0].lower() not in SPLIT_NAMES
    ):
        levels = [each[1:] for each in levels]
    if min(map(len, levels)) > 1 and all(each[0].lower() in SPLIT_NAMES for each in levels):
        parts = np.asarray([SPLITS.index(SPLIT_NAMES[each[0].lower()]) for each in levels], dtype=np.int8)
        return parts, [each[1] for each in levels]
    return None, [each[0] for each in levels]


def splits_of_shards(
    whole: _Together, named: Sequence[int], folder_splits: np.ndarray | None
) -> tuple[np.ndarray | None, str]:
    """Return each image's number in `SPLITS`, None where there are no parts, and what tells them.

    Raises:
        ValueError: a shard's name and what is in it disagree, or only some images are of a part.
    """
    inside = (
        whole.splits if folder_splits is None else np.where(whole.splits < 0, folder_splits[whole.codes], whole.splits)
    )
    outside = np.repeat(np.asarray(named, dtype=np.int8), whole.counts)
    against = np.flatnonzero((inside >= 0) & (outside >= 0) & (inside != outside))
    if len(against):
        first = int(against[0])
        raise whole.fault(
            first, f"is of {SPLITS[inside[first]]}, but the name of its shard tells {SPLITS[outside[first]]}; mend one"
        )
    split = np.where(inside < 0, outside, inside)
    if (split < 0).all():
        return None, BY_NAME
    if (split < 0).any():
        raise whole.fault(
            int(np.argmax(split < 0)),
            "is of no part, as others are; write a split in each .json, or let the names of all shards tell it (train-…, "
            "val-…, test-…)",
        )
    return split, BY_JSON if (whole.splits >= 0).any() else BY_FOLDER if (inside >= 0).any() else BY_NAME


def classes_of_shards(
    whole: _Together, names: Sequence[str], classes: tuple[str, ...] | None, split: np.ndarray | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return labels in class order, that of `classes` or of the sorted names, and the class of every image.

    Raises:
        ValueError: an image is of an unknown class, or of one that training does not have.
    """
    train = split is not None and (split == 0).any()
    known = np.unique(whole.codes[split == 0] if train else whole.codes)
    labels = classes or tuple(sorted({names[int(code)] for code in known}))
    place = {label: target for target, label in enumerate(labels)}
    targets = np.asarray([place.get(name, -1) for name in names], dtype=np.int64)[whole.codes]
    foreign = np.flatnonzero(targets < 0)
    if len(foreign):
        first = int(foreign[0])
        where = "classes.json does not have it" if classes else "no image of train is of it"
        raise whole.fault(
            first,
            f"{unknown('class', names[int(whole.codes[first])], labels[:50])}. In all, {len(foreign):,} images are of classes "
            f"that are not known: {where}",
        )
    return labels, targets
