"""Open the dataset that DATA names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from vitrail.data.datasets.base import ArrayDataset, Dataset
from vitrail.data.datasets.folder import open_image_folder
from vitrail.data.datasets.hf_sets import open_hf_dataset
from vitrail.data.datasets.table import TABLE_ENDINGS, open_table
from vitrail.data.datasets.torchvision_sets import open_torchvision_dataset
from vitrail.data.datasets.webdataset.shards import is_address, is_shards, open_shards, shards_name
from vitrail.data.progress import Bar, no_bar
from vitrail.lookup import unknown

# Prefix of a dataset that is given by name instead of by path → the function that opens it.
SCHEMES: dict[str, Callable[..., Dataset]] = {"torchvision:": open_torchvision_dataset, "hf:": open_hf_dataset}


def open_dataset(
    source: str, *, limit_pixels: int = 100_000_000, keep_damaged: bool = False, bar: Bar = no_bar
) -> Dataset:
    """List the images of a dataset.

    Args:
        source: DATA as the user typed it.
        bar: shows the progress of a long listing, as `Console.bar` does.

    Raises:
        ValueError: `source` is no known kind of dataset, is empty, or its splits disagree on the classes.
    """
    damaged: Literal["refuse", "keep"] = "keep" if keep_damaged else "refuse"
    if source == "digits":
        return digits_dataset()
    if is_shards(source):
        return open_shards(source, limit_pixels=limit_pixels, damaged=damaged, bar=bar)
    for scheme, open_named in SCHEMES.items():
        if source.startswith(scheme):
            return open_named(source.removeprefix(scheme), limit_pixels=limit_pixels, damaged=damaged)
    path = Path(source).expanduser()
    if path.is_dir():
        return open_image_folder(path, limit_pixels=limit_pixels, damaged=damaged)
    is_table = path.suffix.lower() in TABLE_ENDINGS
    if is_table and path.is_file():
        return open_table(path, limit_pixels=limit_pixels, damaged=damaged)
    if path.exists():
        raise ValueError(
            f"{source}: is a file; expected a folder of class folders, a table ({', '.join(TABLE_ENDINGS)}), tar shards "
            "(.tar), or the word 'digits'"
        )
    if is_table:
        raise ValueError(f"{source}: no such file; expected a table with the columns path and label")
    raise ValueError(f"{source}: no such folder. {dataset_hint(source)}".rstrip())


def dataset_hint(source: str) -> str:
    """Return the nearest known dataset names for an unknown `source`; empty for what is clearly a path."""
    scheme, colon, _ = source.partition(":")
    if any(mark in scheme for mark in "/\\."):
        return ""
    return unknown("dataset", scheme + colon, ["digits", *SCHEMES])


def run_name(source: str) -> str:
    """Return a name for runs on this data that can serve as a folder name."""
    if source.endswith(".tar") or is_address(source):
        return shards_name(source)
    for scheme in SCHEMES:
        if source.startswith(scheme):
            return Path(source.removeprefix(scheme)).name
    path = Path(source).resolve()
    return path.stem if path.suffix.lower() in TABLE_ENDINGS else path.name


def same_dataset(one: str, other: str) -> bool:
    """Return whether two DATA strings name the same dataset."""
    if one.startswith("torchvision:"):
        return one.lower() == other.lower()
    if is_address(one) or is_address(other):
        return one == other
    if one.startswith("hf:") and other.startswith("hf:"):
        return same_path(one.removeprefix("hf:"), other.removeprefix("hf:"))
    return one == other or (not (is_name(one) or is_name(other)) and same_path(one, other))


def is_name(source: str) -> bool:
    """Return whether a DATA string is a name or an address rather than a path."""
    return source == "digits" or source.startswith(tuple(SCHEMES)) or is_address(source)


def same_path(one: str, other: str) -> bool:
    """Return whether two paths lead to the same file or folder."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def digits_dataset() -> ArrayDataset:
    """Return the 1,797 handwritten digits inside scikit-learn: 8×8 pixels, 17 grey levels (Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)  # 0 to 16
    return ArrayDataset(
        name="digits",
        labels=tuple("0123456789"),
        paths=[f"digits/{index:04d}" for index in range(len(targets))],
        targets=np.asarray(targets, dtype=np.int64),
        flip_reason="a mirrored digit is another sign",
        arrays=(np.round(np.asarray(values).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8),),
    )
