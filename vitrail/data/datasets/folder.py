"""Image folders: a folder for each class, with or without train/ val/ test/ above them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS, FileDataset, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.images.decode import inspect_image, is_image_name
from vitrail.data.problems import Problem
from vitrail.lookup import unknown


@dataclass
class _Listing:
    """The images of class folders, folder after folder; `counts` holds (split, class index, number of images)."""

    paths: StringArray = field(default_factory=StringArray)
    counts: list[tuple[str, int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def open_image_folder(
    root: Path, *, limit_pixels: int, damaged: Literal["refuse", "keep"], all_classes: bool = False
) -> FileDataset:
    """List class folders, as in ImageNet: `root/<class>/…` or `root/{train,val,test}/<class>/…`.

    The first folder level is the class; images may lie deeper. Class order is the sorted names, as in torchvision's
    ImageFolder.

    Args:
        all_classes: take the classes of all splits together, where otherwise one that training lacks is an error.

    Raises:
        ValueError: there are no classes or no images, or the splits disagree on the classes.
    """
    folders = subfolders(root)
    splits = split_folders(root, folders)
    labels = class_folders(root, folders, splits, all_classes)
    listing = list_splits(root, folders, splits, labels)
    names, targets, numbers = zip(*listing.counts, strict=True)
    return FileDataset(
        name=root.resolve().name,
        root=root,
        labels=tuple(labels),
        paths=listing.paths,
        targets=np.repeat(np.asarray(targets, dtype=np.int64), numbers),
        split=None if splits is None else np.repeat(np.asarray(names), numbers),
        problems=tuple(listing.problems),
        flip_reason=flip_reason(labels),
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def class_folders(root: Path, folders: list[str], splits: dict[str, str] | None, all_classes: bool) -> list[str]:
    """Return the class names: those of the training split, or of all splits, or of `root` where it has no splits.

    Raises:
        ValueError: there are none.
    """
    if splits is None:
        labels = folders
    elif all_classes:
        labels = sorted({label for folder in splits for label in subfolders(root / folder)})
    else:
        train = next((folder for folder, split in splits.items() if split == "train"), next(iter(splits)))
        labels = subfolders(root / train)
    if not labels:
        raise ValueError(
            f"{root}: no class folders found; expected {root}/<class>/image.jpg, or {root}/train/<class>/image.jpg"
        )
    return labels


def list_splits(root: Path, folders: list[str], splits: dict[str, str] | None, labels: list[str]) -> _Listing:
    """Return the images of all splits, or of `root` where it has no splits.

    Raises:
        ValueError: a split has a class that is not in `labels`, or there are no images.
    """
    listing = _Listing()
    if splits is None:
        listing.problems += loose_files(root, root)
        list_classes(listing, root, root, "", labels)
    else:
        others = tuple(folder for folder in folders if folder not in splits)
        if others:
            text = "folders beside train/, val/ and test/ are not read"
            listing.problems.append(Problem("warning", "name", others, text))
        for name, split in splits.items():
            check_classes(root / name, subfolders(root / name), labels)
            listing.problems += loose_files(root / name, root)
            list_classes(listing, root, root / name, split, labels)
    if not listing.paths:
        raise ValueError(f"{root}: the class folders {', '.join(labels[:5])} hold no images")
    return listing


def list_classes(listing: _Listing, root: Path, folder: Path, split: str, labels: list[str]) -> None:
    """Add the images of the class folders in `folder` to a listing; `split` is empty where there are no splits."""
    for target, label in enumerate(labels):
        images, skipped = list_images(folder / label, root) if (folder / label).is_dir() else ([], [])
        if skipped:
            text = f"{len(skipped)} files that are not images are skipped"
            listing.problems.append(Problem("warning", "name", tuple(skipped), text))
        if not images:
            listing.problems.append(missing_class(split, label, (folder / label).relative_to(root).as_posix()))
        listing.paths.extend(images)
        listing.counts.append((split, target, len(images)))


def subfolders(root: Path) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden ones and macOS archive remains."""
    with os.scandir(root) as entries:
        return sorted(each.name for each in entries if each.is_dir() and not each.name.startswith((".", "__MACOSX")))


def split_folders(root: Path, folders: list[str]) -> dict[str, str] | None:
    """Return {folder name: split} when `root` has the folders train/ val/ test/, or None when it holds classes.

    A folder counts as a split only when it has folders of its own, so that a class may be called "train".

    Raises:
        ValueError: two folders name the same split, for instance val/ and valid/.
    """
    named = {each: SPLIT_NAMES[each.lower()] for each in folders if each.lower() in SPLIT_NAMES}
    splits = {folder: split for folder, split in named.items() if subfolders(root / folder)}
    if "train" not in splits and (not splits or len(splits) < len(folders)):
        return None
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{root}: {', '.join(splits)} name the same split twice; keep one folder for each")
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))


def list_images(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Return the images below `folder` and the files skipped, as paths relative to `root`, sorted.

    Of a file whose name does not end like an image's, the header is read: a JPEG without an ending is an image.
    """
    images, skipped = [], []
    start, prefix = len(os.path.join(folder, "")), folder.relative_to(root).as_posix()
    for path in walk(folder):
        name = os.path.basename(path)
        if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
            continue
        inside = path[start:].replace(os.sep, "/")
        is_image = is_image_name(name) or has_image_header(Path(path))
        (images if is_image else skipped).append(inside if prefix == "." else f"{prefix}/{inside}")
    return sorted(images), sorted(skipped)


def has_image_header(path: Path) -> bool:
    """Return whether a file begins like an image; a pipe, a dangling link or a locked file does not."""
    try:
        return path.is_file() and inspect_image(path, decode=False).verdict == "ok"
    except OSError:
        return False


def walk(folder: Path) -> Iterator[str]:
    """Yield every file below `folder`; links are followed, but no folder is entered twice."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (os.path.join(parent, each) for each in files)


def check_classes(folder: Path, split_labels: list[str], labels: Sequence[str]) -> None:
    """Raise a ValueError when a split has a class that the training split does not have."""
    for label in split_labels:
        if label not in labels:
            raise ValueError(
                f"{folder}: {unknown('class', label, labels)}. Every split must use the classes of the first; "
                "add the class to train/ or remove this folder"
            )


def missing_class(split: str, label: str, folder: str) -> Problem:
    """Return the problem of a class without images: an error where the model should learn it, else a warning."""
    severity = "error" if split in ("", "train") else "warning"
    where = f"in {split}/ " if split else ""
    return Problem(severity, "missing-class", (folder,), f"class {label!r} has no images {where}({folder})")


def loose_files(folder: Path, root: Path) -> list[Problem]:
    """Return the problem of images beside the class folders, which have no label; none without such images."""
    with os.scandir(folder) as entries:
        loose = sorted(each.name for each in entries if each.is_file() and is_image_name(each.name))
    if not loose:
        return []
    names = tuple((folder / each).relative_to(root).as_posix() for each in loose)
    return [
        Problem("warning", "name", names, f"{len(loose)} images in {folder} are in no class folder and are not used")
    ]
