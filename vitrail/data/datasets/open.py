"""Labelled images, wherever they come from: what DATA may be on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from vitrail.data.datasets.base import ArrayDataset, Dataset
from vitrail.data.datasets.folder import open_folder
from vitrail.data.datasets.hf_sets import open_hf
from vitrail.data.datasets.table import TABLE_ENDINGS, open_table
from vitrail.data.datasets.torchvision_sets import open_torchvision
from vitrail.data.datasets.webdataset.shards import is_address, is_shards, open_shards, shards_name
from vitrail.data.progress import Bar, no_bar
from vitrail.lookup import unknown

# What stands before the colon of a dataset that has a name instead of a place.
SCHEMES: dict[str, Callable[..., Dataset]] = {"torchvision:": open_torchvision, "hf:": open_hf}


def open_dataset(
    source: str, *, limit_pixels: int = 100_000_000, keep_damaged: bool = False, bar: Bar = no_bar
) -> Dataset:
    """List the images of a source.

    Args:
        bar: shows how far a long listing is, as `Console.bar` does.

    Raises:
        ValueError: it is no known kind of source, is empty, or its parts disagree on the classes.
    """
    damaged: Literal["refuse", "keep"] = "keep" if keep_damaged else "refuse"
    if source == "digits":
        return digits()
    if is_shards(source):
        return open_shards(source, limit_pixels=limit_pixels, damaged=damaged, bar=bar)
    for scheme, open_set in SCHEMES.items():
        if source.startswith(scheme):
            return open_set(source.removeprefix(scheme), limit_pixels=limit_pixels, damaged=damaged)
    place = Path(source).expanduser()
    if place.is_dir():
        return open_folder(place, limit_pixels=limit_pixels, damaged=damaged)
    table = place.suffix.lower() in TABLE_ENDINGS
    if table and place.is_file():
        return open_table(place, limit_pixels=limit_pixels, damaged=damaged)
    if place.exists():
        raise ValueError(
            f"{source}: is a file; expected a folder of class folders, a table ({', '.join(TABLE_ENDINGS)}), tar shards "
            "(.tar), or the word 'digits'"
        )
    if table:
        raise ValueError(f"{source}: no such file; expected a table with the columns path and label")
    raise ValueError(f"{source}: no such folder. {dataset_hint(source)}".rstrip())


def dataset_hint(source: str) -> str:
    """Say what a word that names no data may have meant; nothing for what is clearly a path."""
    scheme, colon, _ = source.partition(":")
    if any(mark in scheme for mark in "/\\."):
        return ""
    return unknown("dataset", scheme + colon, ["digits", *SCHEMES])


def run_name(source: str) -> str:
    """Return a name for runs on this data that can be a folder's."""
    if source.endswith(".tar") or is_address(source):
        return shards_name(source)
    for scheme in SCHEMES:
        if source.startswith(scheme):
            return Path(source.removeprefix(scheme)).name
    place = Path(source).resolve()
    return place.stem if place.suffix.lower() in TABLE_ENDINGS else place.name


def same_dataset(one: str, other: str) -> bool:
    """Whether two words name the same data."""
    if one.startswith("torchvision:"):
        return one.lower() == other.lower()
    if is_address(one) or is_address(other):
        return one == other
    if one.startswith("hf:") and other.startswith("hf:"):
        return same_place(one.removeprefix("hf:"), other.removeprefix("hf:"))
    return one == other or (not (is_name(one) or is_name(other)) and same_place(one, other))


def is_name(source: str) -> bool:
    """Whether a word names a dataset rather than a place."""
    return source == "digits" or source.startswith(tuple(SCHEMES)) or is_address(source)


def same_place(one: str, other: str) -> bool:
    """Whether two paths lead to the same place."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def digits() -> ArrayDataset:
    """The 1,797 handwritten digits inside scikit-learn: 8×8 pixels, 17 grey levels (Alpaydin & Kaynak 1998)."""
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
