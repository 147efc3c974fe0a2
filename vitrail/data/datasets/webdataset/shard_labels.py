"""Join the indexes of shards to one dataset, whose classes, splits and groups must agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS, TarDataset, TarShard, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.datasets.table import groups_across_splits
from vitrail.data.datasets.webdataset.shard_index import ClassMarks, ShardIndex
from vitrail.data.problems import Problem
from vitrail.lookup import unknown

BY_JSON, BY_NAME, BY_FOLDER = "the split in .json:", "the names of the shards:", "the folders in the shards:"


class ClassNames(NamedTuple):
    """The content of `classes.json`: class names in class order, and why images must not be mirrored."""

    names: tuple[str, ...]
    flip_reason: str


class _JoinedIndex:
    """The indexes of all shards, one after the other."""

    def __init__(self, shards: Sequence[TarShard], indexes: Sequence[ShardIndex]) -> None:
        self.shards, self.indexes = shards, indexes
        self.counts = np.asarray([len(index.paths) for index in indexes])
        self.firsts = np.cumsum(self.counts) - self.counts
        self.starts, self.sizes, self.splits = (self.concatenate(name) for name in ("starts", "sizes", "splits"))
        self.weights = self.concatenate("weights")
        marks: dict[ClassMarks, int] = {}
        groups: dict[str, int] = {}
        self.codes = np.concatenate([renumbered(each.codes, each.marks, marks) for each in indexes])
        self.groups = np.concatenate([renumbered(each.groups, each.group_names, groups) for each in indexes])
        self.marks, self.group_names = list(marks), list(groups)

    def concatenate(self, name: str) -> np.ndarray:
        """Return an array of the indexes, for all shards."""
        return np.concatenate([np.asarray(getattr(index, name)) for index in self.indexes])

    def fault(self, index: int, text: str) -> ValueError:
        """Return an error about an image."""
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        member = self.indexes[number].paths[index - int(self.firsts[number])]
        return ValueError(f"{self.shards[number].location}: {member}: {text}")

    def first(self, code: int) -> int:
        """Return the index of the first image with the class mark `code`."""
        return int(np.argmax(self.codes == code))


def renumbered(codes: np.ndarray, names: Sequence, all_names: dict) -> np.ndarray:
    """Return codes for `names` as codes for `all_names`, to which new names are added; -1 stays."""
    numbers = np.asarray([all_names.setdefault(name, len(all_names)) for name in names] + [-1], dtype=np.int32)
    return numbers[np.asarray(codes)]


def join_shards(
    name: str,
    shards: Sequence[TarShard],
    indexes: Sequence[ShardIndex],
    *,
    classes: ClassNames | None,
    splits: Sequence[int],
    limit_pixels: int,
    damaged: Literal["refuse", "keep"],
) -> TarDataset:
    """Return one dataset of several shards.

    Args:
        classes: the content of `classes.json` beside the shards, where there is one.
        splits: for each shard the index in `SPLITS` of the split in its name, -1 for none.

    Raises:
        ValueError: samples contradict each other, or some lack what others have.
    """
    joined = _JoinedIndex(shards, indexes)
    folder_splits, names = class_names_of(joined, classes and classes.names)
    split, split_origin = splits_of_shards(joined, splits, folder_splits)
    labels, targets = classes_of_shards(joined, names, classes and classes.names, split)
    grouped = bool((joined.groups >= 0).any())
    problems = groups_across_splits(joined.group_names, split, joined.groups) if grouped and split is not None else []
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
        groups=joined.groups if grouped else None,
        weights=weights_of(joined),
        split_origin=split_origin,
        problems=tuple(problems),
        flip_reason=(classes.flip_reason if classes else "") or flip_reason(labels),
        shards=tuple(shards),
        firsts=joined.firsts,
        starts=joined.starts,
        sizes=joined.sizes,
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def weights_of(joined: _JoinedIndex) -> np.ndarray | None:
    """Return the loss weight of each image, None where no image has one.

    Raises:
        ValueError: only some images have one.
    """
    missing = np.isnan(joined.weights)
    if missing.all():
        return None
    if missing.any():
        raise joined.fault(
            int(np.argmax(missing)), "has no weight in its .json, but others have; write it in all or in none"
        )
    return joined.weights


def class_names_of(joined: _JoinedIndex, classes: tuple[str, ...] | None) -> tuple[np.ndarray | None, list[str]]:
    """Return the class name of each class mark, and their splits where these are folders in the shards.

    Raises:
        ValueError: samples give their labels in different ways, or .cls and .json of one sample disagree.
    """
    kinds = [mark.kind for mark in joined.marks]
    odd = next((code for code, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        raise joined.fault(
            joined.first(odd),
            f"its label is in its {kinds[odd]}, those of others in their {kinds[0]}; write it in one way in all samples",
        )
    if kinds[0] == "folder":
        return by_folder([mark.folder for mark in joined.marks])
    names, names_of_numbers = [], {}
    for code, mark in enumerate(joined.marks):
        cls_name = name_of_cls(mark.cls, classes)
        if cls_name is None:
            raise joined.fault(
                joined.first(code),
                f"class {mark.cls} in its .cls, but classes.json has {len(classes or ())} names, from 0",
            )
        # Without classes.json, a number may stand for a name, but always for the same one.
        same = not mark.label or not mark.cls or cls_name == mark.label
        if not same and classes is None and mark.cls.isdecimal():
            same = names_of_numbers.setdefault(mark.cls, mark.label) == mark.label
        if not same:
            raise joined.fault(
                joined.first(code),
                f"its .cls says {mark.cls} ({names_of_numbers.get(mark.cls, cls_name)!r}), its .json {mark.label!r}; fix one of them",
            )
        names.append(mark.label or cls_name)
    return None, names


def name_of_cls(cls: str, classes: tuple[str, ...] | None) -> str | None:
    """Return the class name for the text of a .cls; None for a number that has no name in `classes`."""
    if classes is None or not cls.isdecimal():
        return cls
    return classes[int(cls)] if int(cls) < len(classes) else None


def by_folder(folders: Sequence[str]) -> tuple[np.ndarray | None, list[str]]:
    """Return splits and class names by the folders of images in their tars.

    As in image folders on disk, the first level is the class, below train/ val/ test/ where all images are in such
    folders; folders above, which all images share, do not count.
    """
    levels = [folder.split("/") for folder in folders]
    while (
        min(map(len, levels)) > 1 and len({each[0] for each in levels}) == 1 and levels[0][0].lower() not in SPLIT_NAMES
    ):
        levels = [each[1:] for each in levels]
    if min(map(len, levels)) > 1 and all(each[0].lower() in SPLIT_NAMES for each in levels):
        splits = np.asarray([SPLITS.index(SPLIT_NAMES[each[0].lower()]) for each in levels], dtype=np.int8)
        return splits, [each[1] for each in levels]
    return None, [each[0] for each in levels]


def splits_of_shards(
    joined: _JoinedIndex, shard_splits: Sequence[int], folder_splits: np.ndarray | None
) -> tuple[np.ndarray | None, str]:
    """Return the index in `SPLITS` of each image's split, None where there are no splits, and what defines them.

    Raises:
        ValueError: the name of a shard and its content disagree, or only some images have a split.
    """
    by_content = (
        joined.splits
        if folder_splits is None
        else np.where(joined.splits < 0, folder_splits[joined.codes], joined.splits)
    )
    by_shard = np.repeat(np.asarray(shard_splits, dtype=np.int8), joined.counts)
    conflicts = np.flatnonzero((by_content >= 0) & (by_shard >= 0) & (by_content != by_shard))
    if len(conflicts):
        first = int(conflicts[0])
        raise joined.fault(
            first,
            f"is of {SPLITS[by_content[first]]}, but the name of its shard says {SPLITS[by_shard[first]]}; fix one",
        )
    split = np.where(by_content < 0, by_shard, by_content)
    if (split < 0).all():
        return None, BY_NAME
    if (split < 0).any():
        raise joined.fault(
            int(np.argmax(split < 0)),
            "has no split, as others have; write a split in each .json, or begin the names of all shards with it (train-…, "
            "val-…, test-…)",
        )
    return split, BY_JSON if (joined.splits >= 0).any() else BY_FOLDER if (by_content >= 0).any() else BY_NAME


def classes_of_shards(
    joined: _JoinedIndex, names: Sequence[str], classes: tuple[str, ...] | None, split: np.ndarray | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return labels in class order, that of `classes` or of the sorted names, and the class of every image.

    Raises:
        ValueError: an image is of an unknown class, or of one that the training split does not have.
    """
    train = split is not None and (split == 0).any()
    known = np.unique(joined.codes[split == 0] if train else joined.codes)
    labels = classes or tuple(sorted({names[int(code)] for code in known}))
    numbers = {label: target for target, label in enumerate(labels)}
    targets = np.asarray([numbers.get(name, -1) for name in names], dtype=np.int64)[joined.codes]
    foreign = np.flatnonzero(targets < 0)
    if len(foreign):
        first = int(foreign[0])
        where = "classes.json does not have it" if classes else "no image of train is of it"
        raise joined.fault(
            first,
            f"{unknown('class', names[int(joined.codes[first])], labels[:50])}. In all, {len(foreign):,} images are of unknown "
            f"classes: {where}",
        )
    return labels, targets
