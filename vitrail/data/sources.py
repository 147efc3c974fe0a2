"""Where labelled pictures come from: the built-in digits, or folders of class folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from vitrail.data.decode import inspect_picture, is_picture_name, read_picture
from vitrail.data.problems import Problem
from vitrail.lookup import unknown

# In any case of letters: Train/ and Test/ must not silently be read as two classes.
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """Labelled pictures, listed but not yet read.

    Attributes:
        name: what the user called it, for messages and file names.
        labels: class names in class order.
        paths: one identifying path per picture, relative to the source, `/` between parts.
        targets: [N] class index of every picture.
        split: name of the part (train, val, test) of every picture where the source has parts, or None.
        problems: what was found wrong while listing.
        flip_reason: why pictures of this source must not be mirrored, or an empty string.
    """

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def paths(self) -> Sequence[str]: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def split(self) -> np.ndarray | None: ...
    @property
    def problems(self) -> tuple[Problem, ...]: ...
    @property
    def flip_reason(self) -> str: ...

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        """Return one picture; raises `PictureError` when it is broken."""
        ...

    def location(self, index: int) -> str:
        """Return where one picture is, for people."""
        ...


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits inside scikit-learn: 8×8 pixels, 17 grey levels (Alpaydin & Kaynak 1998)."""

    name: str = "digits"
    labels: tuple[str, ...] = tuple("0123456789")
    split: None = None
    problems: tuple[Problem, ...] = ()
    flip_reason: str = "a mirrored digit is another sign"
    paths: Sequence[str] = field(init=False)
    targets: np.ndarray = field(init=False)
    pixels: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from sklearn.datasets import load_digits

        values, targets = load_digits(return_X_y=True)  # 0 to 16
        pixels = np.round(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        object.__setattr__(self, "targets", np.asarray(targets, dtype=np.int64))
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "paths", [f"digits/{index:04d}" for index in range(len(self.targets))])

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.pixels[index]).convert(mode)

    def location(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class Folder:
    """Class folders, as in ImageNet: `root/<class>/…` or `root/{train,val,test}/<class>/…`.

    The first folder level is the class; pictures may lie deeper. Class order is the sorted names, as in torchvision's
    ImageFolder.
    """

    name: str
    root: Path
    labels: tuple[str, ...]
    paths: Sequence[str]
    targets: np.ndarray
    split: np.ndarray | None
    problems: tuple[Problem, ...]
    flip_reason: str
    limit_pixels: int
    damaged: Literal["refuse", "keep"]

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return read_picture(
            self.root / self.paths[index], mode=mode, limit_pixels=self.limit_pixels, damaged=self.damaged
        )

    def location(self, index: int) -> str:
        return str(self.root / self.paths[index])


def open_source(source: str, *, limit_pixels: int = 100_000_000, keep_damaged: bool = False) -> Source:
    """List the pictures of a source.

    Raises:
        ValueError: it is no known kind of source, is empty, or its parts disagree on the classes.
    """
    if source == "digits":
        return Digits()
    root = Path(source).expanduser()
    if root.is_dir():
        return open_folder(root, limit_pixels=limit_pixels, damaged="keep" if keep_damaged else "refuse")
    if root.exists():
        raise ValueError(f"{source}: is a file; expected a folder of class folders, or the word 'digits'")
    hint = unknown("data set", source, ["digits"]) if not any(mark in source for mark in "/\\.:") else ""
    raise ValueError(f"{source}: no such folder. {hint}".rstrip())


def open_folder(
    root: Path, *, limit_pixels: int, damaged: Literal["refuse", "keep"], all_classes: bool = False
) -> Folder:
    """List a folder of class folders, with or without train/ val/ test/ above them.

    Args:
        all_classes: take the classes of all parts together, where otherwise one that training lacks is an error.
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
            f"{root}: no class folders found; expected {root}/<class>/picture.jpg, or {root}/train/<class>/picture.jpg"
        )
    paths, targets, split = [], [], []
    for part, folder in roots:
        if parts is not None:
            check_classes(folder, subfolders(folder), labels)
            problems += loose_files(folder, root)
        for target, label in enumerate(labels):
            found, skipped = list_pictures(folder / label, root) if (folder / label).is_dir() else ([], [])
            if skipped:
                problems.append(
                    Problem(
                        "warning", "name", tuple(skipped), f"{len(skipped)} files that are not pictures are skipped"
                    )
                )
            if not found:
                problems.append(missing_class(part, label, (folder / label).relative_to(root).as_posix()))
            paths += found
            targets += [target] * len(found)
            split += [part] * len(found)
    if not paths:
        raise ValueError(f"{root}: the class folders {', '.join(labels[:5])} hold no pictures")
    return Folder(
        name=root.resolve().name,
        root=root,
        labels=tuple(labels),
        paths=paths,
        targets=np.asarray(targets, dtype=np.int64),
        split=None if parts is None else np.asarray(split),
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
    named = {each: SPLIT_FOLDERS[each.lower()] for each in folders if each.lower() in SPLIT_FOLDERS}
    parts = {each: part for each, part in named.items() if subfolders(root / each)}
    if "train" not in parts and (not parts or len(parts) < len(folders)):
        return None
    if len(set(parts.values())) < len(parts):
        raise ValueError(f"{root}: {', '.join(parts)} name the same part twice; keep one folder for each")
    order = ["train", "val", "test"]
    return dict(sorted(parts.items(), key=lambda item: order.index(item[1])))


def list_pictures(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """Return the pictures below `folder` and the files skipped, as paths relative to `root`, sorted.

    A file whose name does not end like a picture's is looked into: a JPEG without an ending is a picture.
    """
    found, skipped = [], []
    for path in walk(folder):
        if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
            continue
        relative = path.relative_to(root).as_posix()
        if is_picture_name(path.name) or has_picture_header(path):
            found.append(relative)
        else:
            skipped.append(relative)
    return sorted(found), sorted(skipped)


def has_picture_header(path: Path) -> bool:
    """Whether a file begins like a picture; a pipe, a link to nowhere or a locked file does not."""
    try:
        return path.is_file() and inspect_picture(path, decode=False).verdict == "ok"
    except OSError:
        return False


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`; links are followed, but no folder is entered twice."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        yield from (Path(place, each) for each in files)


def check_classes(folder: Path, found: list[str], labels: Sequence[str]) -> None:
    """Raise a ValueError when a part has a class that training does not know."""
    for label in found:
        if label not in labels:
            raise ValueError(
                f"{folder}: {unknown('class', label, labels)}. Every part must use the classes of the first; "
                "add the class to train/ or remove this folder"
            )


def missing_class(part: str, label: str, folder: str) -> Problem:
    """Describe a class without pictures: an error where the model should learn it, else a warning."""
    severity = "error" if part in ("", "train") else "warning"
    where = f"in {part}/ " if part else ""
    return Problem(severity, "missing-class", (folder,), f"class {label!r} has no pictures {where}({folder})")


def loose_files(folder: Path, root: Path) -> list[Problem]:
    """Report pictures that lie beside the class folders and so have no label."""
    with os.scandir(folder) as entries:
        loose = sorted(each.name for each in entries if each.is_file() and is_picture_name(each.name))
    if not loose:
        return []
    names = tuple((folder / each).relative_to(root).as_posix() for each in loose)
    return [
        Problem("warning", "name", names, f"{len(loose)} pictures in {folder} are in no class folder and are not used")
    ]


def flip_reason(labels: Sequence[str]) -> str:
    """Say why pictures of these classes must not be mirrored, judging by the names; empty when they may."""
    if all(len(label) == 1 and label.isalnum() for label in labels):
        return "the classes are single letters or digits, and a mirrored sign is another sign"
    sides = [
        label
        for label in labels
        if {"left", "right"} & set(label.lower().replace("-", "_").replace(" ", "_").split("_"))
    ]
    if sides:
        return f"class {sides[0]!r} names a side, which mirroring would change"
    return ""
