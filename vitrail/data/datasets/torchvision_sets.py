"""`torchvision:NAME`: torchvision's classification datasets, in their published splits."""

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

SPLIT_ORIGIN = "its own splits"
SIGNS = "the classes are signs, and a mirrored sign is another sign"
BY_TRAIN: Mapping[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def by_split(**names: str) -> Mapping[str, dict[str, Any]]:
    """Return torchvision's arguments for each of our splits, where its argument `split` has these names."""
    return {split: {"split": name} for split, name in names.items()}


@dataclass(frozen=True)
class SetReader:
    """How one of torchvision's datasets is read.

    Attributes:
        splits: our split → torchvision's arguments for it; "" for all of a dataset without splits.
        images_attribute: name of the attribute with the images: `data` for arrays; else paths, or (path, class) pairs.
        targets_attribute: name of the attribute with the classes, where the images come without.
        labels: class names, where torchvision has none.
        flip_reason: why its images must not be mirrored, where the class names do not show it.
    """

    splits: Mapping[str, dict[str, Any]]
    images_attribute: str
    targets_attribute: str = ""
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
class _LoadedSplits:
    """The images and classes of all splits, one split after the other."""

    images: list[Any] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: tuple[str, ...] = ()


def open_torchvision_dataset(
    name: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"]
) -> ArrayDataset | FileDataset:
    """List the images of a dataset of torchvision, in any case of letters; it is downloaded on the first call.

    Raises:
        ValueError: the name is unknown, the dataset cannot be downloaded, or its files are broken.
    """
    known_name = next((known for known in SETS if known.lower() == name.lower()), None)
    if known_name is None:
        raise ValueError(f"torchvision:{name}: {unknown('dataset', name, SETS)}")
    entry, root = SETS[known_name], cache_folder() / "torchvision" / known_name
    loaded = load_all_splits(known_name, entry, root)
    common: dict[str, Any] = {
        "name": f"torchvision:{known_name}",
        "labels": loaded.labels,
        "targets": np.concatenate(loaded.targets),
        "split": None if loaded.splits == [""] else np.repeat(loaded.splits, [len(each) for each in loaded.targets]),
        "split_origin": SPLIT_ORIGIN,
        "flip_reason": entry.flip_reason or flip_reason(loaded.labels),
    }
    if entry.images_attribute == "data":
        return ArrayDataset(
            arrays=tuple(map(as_array, loaded.images)),
            paths=StringArray(
                f"{split}/{number:06d}"
                for split, images in zip(loaded.splits, loaded.images, strict=True)
                for number in range(len(images))
            ),
            **common,
        )
    return FileDataset(
        root=root,
        paths=StringArray(Path(os.path.relpath(path, root)).as_posix() for paths in loaded.images for path in paths),
        limit_pixels=limit_pixels,
        damaged=damaged,
        **common,
    )


def load_all_splits(name: str, entry: SetReader, root: Path) -> _LoadedSplits:
    """Return all splits of a dataset, which is downloaded when its folder is missing."""
    from torchvision import datasets

    dataset_class, loaded = getattr(datasets, name), _LoadedSplits()

    def fill(draft: Path) -> None:
        for arguments in entry.splits.values():
            dataset_class(str(draft), download=True, **arguments)

    try:
        filled_folder(root, fill)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"torchvision:{name}: cannot be downloaded ({first_line(error)}); connect this machine to the network, or put "
            f"the files that torchvision.datasets.{name} downloads into {root}"
        ) from None
    for split, arguments in entry.splits.items():
        try:
            dataset = dataset_class(str(root), **arguments)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise ValueError(
                f"torchvision:{name}: the files in {root} are not whole ({first_line(error)}); remove that folder to download "
                "them again"
            ) from None
        images, targets = getattr(dataset, entry.images_attribute), getattr(dataset, entry.targets_attribute, None)
        if targets is None:
            images, targets = zip(*images, strict=True)
        loaded.images.append(images)
        loaded.targets.append(np.asarray(targets, dtype=np.int64))
        loaded.splits.append(split)
        loaded.labels = tuple(entry.labels or dataset.classes)
    return loaded


def as_array(values: Any) -> np.ndarray:
    """Return images as uint8 [N, H, W] or [N, H, W, 3]; torchvision has some as a tensor, some with channels first."""
    array = np.asarray(values)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 and array.shape[1] == 3 else array
