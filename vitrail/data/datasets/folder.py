"""Folders of class folders, with or without train/ val/ test/ above them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vitrail.data.datasets.base import SPLIT_NAMES, FileDataset, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.images.decode import inspect_image, is_image_name
from vitrail.data.problems import Problem
from vitrail.lookup import unknown


def open_folder(
    root: Path, *, limit_pixels: int, damaged: Literal["refuse", "keep"], all_classes: bool = False
) -> FileDataset:
    """List class folders, as in ImageNet: `root/<class>/…` or `root/{train,val,test}/<class>/…`.

    The first folder level is the class; images may lie deeper. Class order is the sorted names, as in torchvision's
    ImageFolder.

    Args:
        all_classes: take the classes of all parts together, where otherwise one that training lacks is an error.

    Raises:
        ValueError: there are no classes or no images, or the parts disagree on the classes.
    """
    folders = subfolders(root)
    parts = split_folders(root, folders)
    problems: list[Problem] = []
    if parts is None:
        labels, roots = folders, [("", root)]
        problems += loose_files(root, root)
    else:
        roots = [(part, root / folder) for folder, part in parts.items()]
        labels = subfolders(
            root / next((folder for folder, part in parts.items() if part == "train"), next(iter(parts)))
        )
        others = [folder for folder in folders if folder not in parts]
        if others:
            problems.append(
                Problem("warning", "name", tuple(others), "folders beside train/, val/ and test/ are not read")
            )
    if all_classes and parts is not None:
        labels = sorted({label for _, folder in roots for label in subfolders(folder)})
    if not labels:
        raise ValueError(
            f"{root}: no class folders found; expected {root}/<class>/image.jpg, or {root}/train/<class>/image.jpg"
        )
    paths, counts = StringArray(), []
    for part, folder in roots:
        if parts is not None:
            check_classes(folder, subfolders(folder), labels)
            problems += loose_files(folder, root)
        for target, label in enumerate(labels):
            found, skipped = list_images(folder / label, root) if (folder / label).is_dir() else ([], [])
            if skipped:
                problems.append(
                    Problem("warning", "name", tuple(skipped), f"{len(skipped)} files that are not images are skipped")
                )
            if not found:
                problems.append(missing_class(part, label, (folder / label).relative_to(root).as_posix()))
            paths.extend(found)
            counts.append((part, target, len(found)))
    if not paths:
        raise ValueError(f"{root}: the class folders {', '.join(labels[:5])} hold no images")
    names, targets, numbers = zip(*counts, strict=True)
    return FileDataset(
        name=root.resolve().name,
        root=root,
        labels=tuple(labels),
        paths=paths,
        targets=np.repeat(np.asarray(targets, dtype=np.int64), numbers),
        split=None if parts is None else np.repeat(np.asarray(names), numbers),
        problems=tuple(problems),
        flip_reason=flip_reason(labels),
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def subfolders(root: Path) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden ones and macOS archive remains."""
    with os.scandir(root) as entries:
        return sorted(each.name for each in entries if each.is_dir() and not each.name.startswith((".", "__MACOSX")))


def split_folders(root: Path, folders: list[str]) -> dict[str, str] | None:
    """Return {folder name: part} when `root` is divided into train/ val/ test/, or None when it holds classes.

    A folder counts as a part only when it has folders of its own, so that a class may be called "train".

    Raises:
        ValueError: two folders name the same part, for instance val/ and valid/.
    """
    named = {each: SPLIT_NAMES[each.lower()] for each in folders if each.lower() in SPLIT_NAMES}
    parts = {each: part for each, part in named.items() if subfolders(root / each)}
    if "train" not in parts and (not parts or len(parts) < len(folders)):
        return None
    if len(set(parts.values())) < len(parts):
        raise ValueError(f"{root}: {', '.join(parts)} name the same part twice; keep one folder for each")
    order = ["train", "val", "test"]
    return dict(sorted(parts.items(), key=lambda item: order.index(item[1])))


def list_images(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Return the images below `folder` and the files skipped, as paths relative to `root`, sorted.

    A file whose name does not end like an image's is looked into: a JPEG without an ending is an image.
    """
    found, skipped = [], []
    start, prefix = len(os.path.join(folder, "")), folder.relative_to(root).as_posix()
    for place in walk(folder):
        name = os.path.basename(place)
        if name.startswith(".") or name in ("Thumbs.db", "desktop.ini"):
            continue
        inside = place[start:].replace(os.sep, "/")
        wanted = is_image_name(name) or has_image_header(Path(place))
        (found if wanted else skipped).append(inside if prefix == "." else f"{prefix}/{inside}")
    return sorted(found), sorted(skipped)


def has_image_header(path: Path) -> bool:
    """Whether a file begins like an image; a pipe, a link to nowhere or a locked file does not."""
    try:
        return path.is_file() and inspect_image(path, decode=False).verdict == "ok"
    except OSError:
        return False


def walk(folder: Path) -> Iterator[str]:
    """Yield every file below `folder`; links are followed, but no folder is entered twice."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (os.path.join(place, each) for each in files)


def check_classes(folder: Path, found: list[str], labels: Sequence[str]) -> None:
    """Raise a ValueError when a part has a class that training does not know."""
    for label in found:
        if label not in labels:
            raise ValueError(
                f"{folder}: {unknown('class', label, labels)}. Every part must use the classes of the first; "
                "add the class to train/ or remove this folder"
            )


def missing_class(part: str, label: str, folder: str) -> Problem:
    """Describe a class without images: an error where the model should learn it, else a warning."""
    severity = "error" if part in ("", "train") else "warning"
    where = f"in {part}/ " if part else ""
    return Problem(severity, "missing-class", (folder,), f"class {label!r} has no images {where}({folder})")


def loose_files(folder: Path, root: Path) -> list[Problem]:
    """Report images that lie beside the class folders and so have no label."""
    with os.scandir(folder) as entries:
        loose = sorted(each.name for each in entries if each.is_file() and is_image_name(each.name))
    if not loose:
        return []
    names = tuple((folder / each).relative_to(root).as_posix() for each in loose)
    return [
        Problem("warning", "name", names, f"{len(loose)} images in {folder} are in no class folder and are not used")
    ]
