"""`torchvision:NAME`: torchvision's classification datasets, in the parts that their makers gave them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.data.datasets.base import ArrayDataset, FileDataset, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.files import cache_folder, filled_folder
from vitrail.lookup import first_line, unknown

SPLIT_ORIGIN = "its own parts"
SIGNS = "the classes are signs, and a mirrored sign is another sign"
BY_TRAIN: Mapping[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def by_split(**names: str) -> Mapping[str, dict[str, Any]]:
    """Return how torchvision is asked for each part, where its argument `split` has these names."""
    return {part: {"split": name} for part, name in names.items()}


@dataclass(frozen=True)
class SetReader:
    """How one of torchvision's datasets is read.

    Attributes:
        parts: part → the arguments that ask for it; "" for all of a set without parts.
        held: the attribute with the images: `data` for arrays; else paths, or (path, class) in `samples`.
        answers: the attribute with the classes, where `held` has none.
        labels: class names, where torchvision gives none.
        flip_reason: why its images must not be mirrored, where the class names do not tell.
    """

    splits: Mapping[str, dict[str, Any]]
    held: str
    answers: str = ""
    labels: tuple[str, ...] = ()
    flip_reason: str = ""


SETS: dict[str, SetReader] = {
    "CIFAR10": SetReader(BY_TRAIN, "data", "targets"),
    "CIFAR100": SetReader(BY_TRAIN, "data", "targets"),
    "Country211": SetReader(by_split(train="train", val="valid", test="test"), "samples"),
    "DTD": SetReader(by_split(train="train", val="val", test="test"), "_image_files", "_labels"),
    "EuroSAT": SetReader({"": {}}, "samples"),
    "FashionMNIST": SetReader(BY_TRAIN, "data", "targets"),
    "FGVCAircraft": SetReader(by_split(train="train", val="val", test="test"), "_image_files", "_labels"),
    "Flowers102": SetReader(by_split(train="train", val="val", test="test"), "_image_files", "_labels"),
    "Food101": SetReader(by_split(train="train", test="test"), "_image_files", "_labels"),
    "KMNIST": SetReader(BY_TRAIN, "data", "targets", flip_reason=SIGNS),
    "MNIST": SetReader(BY_TRAIN, "data", "targets", flip_reason=SIGNS),
    "OxfordIIITPet": SetReader(by_split(train="trainval", test="test"), "_images", "_labels"),
    "RenderedSST2": SetReader(by_split(train="train", val="val", test="test"), "_samples", flip_reason=SIGNS),
    "STL10": SetReader(by_split(train="train", test="test"), "data", "labels"),
    "SUN397": SetReader({"": {}}, "_image_files", "_labels"),
    "SVHN": SetReader(by_split(train="train", test="test"), "data", "labels", tuple("0123456789"), SIGNS),
}


@dataclass
class _Gathered:
    """The images of all parts, one part after the other."""

    held: list[Any] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ()


def open_torchvision(name: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"]) -> ArrayDataset | FileDataset:
    """List the images of a dataset of torchvision, in any case of letters; it is downloaded on the first call.

    Raises:
        ValueError: the name is unknown, the dataset cannot be downloaded, or its files are broken.
    """
    known = next((each for each in SETS if each.lower() == name.lower()), None)
    if known is None:
        raise ValueError(f"torchvision:{name}: {unknown('dataset', name, SETS)}")
    entry, root = SETS[known], cache_folder() / "torchvision" / known
    found = gather(known, entry, root)
    common: dict[str, Any] = {
        "name": f"torchvision:{known}",
        "labels": found.labels,
        "targets": np.concatenate(found.targets),
        "split": None if found.splits == [""] else np.repeat(found.splits, [len(each) for each in found.targets]),
        "split_origin": SPLIT_ORIGIN,
        "flip_reason": entry.flip_reason or flip_reason(found.labels),
    }
    if entry.held == "data":
        return ArrayDataset(
            arrays=tuple(map(as_array, found.held)),
            paths=StringArray(
                f"{part}/{number:06d}"
                for part, held in zip(found.splits, found.held, strict=True)
                for number in range(len(held))
            ),
            **common,
        )
    return FileDataset(
        root=root,
        paths=StringArray(Path(os.path.relpath(each, root)).as_posix() for held in found.held for each in held),
        limit_pixels=limit_pixels,
        damaged=damaged,
        **common,
    )


def gather(name: str, entry: SetReader, root: Path) -> _Gathered:
    """Load all parts of a dataset, which is downloaded when its folder is not there."""
    from torchvision import datasets

    kind, found = getattr(datasets, name), _Gathered()

    def fill(draft: Path) -> None:
        for words in entry.splits.values():
            kind(str(draft), download=True, **words)

    try:
        filled_folder(root, fill)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"torchvision:{name}: cannot be downloaded ({first_line(error)}); connect this machine to the network, or put "
            f"the files that torchvision.datasets.{name} downloads into {root}"
        ) from None
    for part, words in entry.splits.items():
        try:
            made = kind(str(root), **words)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise ValueError(
                f"torchvision:{name}: the files in {root} are not whole ({first_line(error)}); remove that folder to download "
                "them again"
            ) from None
        held, answers = getattr(made, entry.held), getattr(made, entry.answers, None)
        if answers is None:
            held, answers = zip(*held, strict=True)
        found.held.append(held)
        found.targets.append(np.asarray(answers, dtype=np.int64))
        found.splits.append(part)
        names = entry.labels or made.classes
        found.labels = tuple(names)
    return found


def as_array(values: Any) -> np.ndarray:
    """Return images as uint8 [N, H, W] or [N, H, W, 3]; torchvision holds some as a tensor, some channels first."""
    array = np.asarray(values)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 and array.shape[1] == 3 else array
