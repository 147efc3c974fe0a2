"""Parquet files that hold the images themselves, as datasets on the Hugging Face hub do.

A row of Parquet cannot be read without the thousand around it, so a shuffled epoch would read everything again for
each batch. The encoded images are therefore copied once, one after the other, to a file in the cache folder, which is
mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.data.datasets.base import SPLIT_NAMES, ParquetDataset, flip_reason
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.problems import Problem
from vitrail.files import cache_folder, replacing

_BATCH = 256
SPLIT_ORIGIN = "its own splits"


def image_column(schema: Any) -> str | None:
    """Return the column of encoded images, bytes or `{bytes, path}` as the hub stores them; None without one."""
    import pyarrow

    for field in schema:
        kind = field.type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return field.name
        if field.name in ("image", "img", "picture") and (
            pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        ):
            return field.name
    return None


def has_images(path: Path) -> bool:
    """Return whether a Parquet file holds images and not paths; a broken file does not."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError):
        return False
    return "path" not in schema.names and image_column(schema) is not None


def open_parquet(
    files: list[Path], name: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"]
) -> ParquetDataset:
    """List the images of Parquet files; the split of a file is that of its name's beginning, or of its folder.

    Raises:
        ValueError: a file has no images or no labels, or only some files have a split.
    """
    import pyarrow.parquet

    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    columns = [(image_column(schema), label_column(file, schema)) for file, schema in zip(files, schemas, strict=True)]
    for file, (image, _) in zip(files, columns, strict=True):
        if image is None:
            raise ValueError(f"{file}: has no column of images (bytes); its columns are {', '.join(schemas[0].names)}")
    splits = [split_of_file(file) for file in files]
    has_splits = any(split is not None for split in splits)
    if has_splits and None in splits:
        odd = files[splits.index(None)]
        raise ValueError(
            f"{odd}: its name begins with no split (train-, validation-, test-), as those of other files do; rename it"
        )
    values, paths, counts = [], StringArray(), []
    for file, (_, label) in zip(files, columns, strict=True):
        column = pyarrow.parquet.read_table(file, columns=[label]).column(label).to_pylist()
        for row, value in enumerate(column, 1):
            if value is None or value == -1 or value == "":
                raise ValueError(f"{file}, row {row}: no {label}; write one, or leave the row out")
        values += column
        counts.append(len(column))
        paths.extend(f"{file.stem}/{row:06d}" for row in range(len(column)))
    labels, targets = classes_of_column(values, stored_class_names(schemas[0], columns[0][1]))
    used = {name for pair in columns for name in pair}
    unread = tuple(dict.fromkeys(name for schema in schemas for name in schema.names if name not in used))
    problems = (
        [Problem("warning", "name", unread, f"{name}: columns {', '.join(unread[:10])}: not read")] if unread else []
    )
    content, starts = map_images(files, [str(image) for image, _ in columns])
    return ParquetDataset(
        name=name,
        labels=labels,
        paths=paths,
        targets=targets,
        split=np.repeat(np.asarray(splits), counts) if has_splits else None,
        split_origin=SPLIT_ORIGIN,
        problems=tuple(problems),
        flip_reason=flip_reason(labels),
        content=content,
        starts=starts,
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def label_column(file: Path, schema: Any) -> str:
    """Return the column of labels: `label` or `labels`, else the only one whose class names are known."""
    for name in ("label", "labels"):
        if name in schema.names:
            return name
    with_names = [name for name in schema.names if stored_class_names(schema, name)]
    if len(with_names) == 1:
        return with_names[0]
    raise ValueError(f"{file}: has no column 'label', but {', '.join(schema.names)}; rename the column that holds it")


def stored_class_names(schema: Any, column: str) -> list[str]:
    """Return the class names that the hub's library wrote into a file; none where it did not."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return list(features[column]["names"])
    except (ValueError, KeyError, TypeError):
        return []


def classes_of_column(values: list[Any], names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return labels in class order and the class of each image: the file's own numbers, else by sorted names."""
    if names and all(isinstance(value, int) and 0 <= value < len(names) for value in values):
        return tuple(names), np.asarray(values, dtype=np.int64)
    labels, targets = np.unique(np.asarray([str(value) for value in values]), return_inverse=True)
    return tuple(labels.tolist()), targets.astype(np.int64)


def split_of_file(file: Path) -> str | None:
    """Return the split in the name of a file (`train-00000-of-00002.parquet`) or of its folder, or None."""
    start = file.stem.split("-")[0].lower()
    return SPLIT_NAMES.get(start) or SPLIT_NAMES.get(file.parent.name.lower())


def map_images(files: list[Path], columns: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoded images of all files, mapped into memory, and their offsets; the first call copies them."""
    import pyarrow.parquet

    states = [(os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.blake2b(json.dumps([states, columns]).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    data, index = folder / f"{digest}.bin", folder / f"{digest}.npy"
    if not (data.exists() and index.exists()):
        starts = [0]
        with replacing(data) as draft, draft.open("wb") as handle:
            for file, column in zip(files, columns, strict=True):
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        raw = value.get("bytes") if isinstance(value, dict) else value
                        if not raw:
                            raise ValueError(
                                f"{file}, row {len(starts)}: no bytes of an image; only what the file holds is read"
                            )
                        starts.append(starts[-1] + handle.write(raw))
        with replacing(index) as draft, draft.open("wb") as handle:
            np.save(handle, np.asarray(starts, dtype=np.int64))
    return np.memmap(data, dtype=np.uint8, mode="r"), np.load(index)
