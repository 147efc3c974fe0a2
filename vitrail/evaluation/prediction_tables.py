"""Predictions as a file: CSV, JSON lines or Parquet, one row per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from vitrail.data.datasets.folder import list_images
from vitrail.evaluation.classifier import Prediction
from vitrail.files import replacing, write_text

PREDICTION_COLUMNS = ("path", "label", "probability", "top_labels", "top_probabilities", "error")
ENDINGS = (".csv", ".jsonl", ".parquet")


def check_ending(path: Path) -> None:
    """Raise a ValueError unless a table can be written under this name."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--out {path}: unknown ending {path.suffix!r}; expected one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")


def write_table(path: Path, rows: Iterable[Prediction]) -> None:
    """Write predictions atomically, in order.

    In CSV, `top_labels` and `top_probabilities` are JSON lists in one cell, so that labels may hold any character.
    """
    check_ending(path)
    records = [{column: getattr(row, column) for column in PREDICTION_COLUMNS} for row in rows]
    if path.suffix.lower() != ".jsonl":  # JSON escapes what is not UTF-8 by itself
        records = [{**record, "path": printable_path(record["path"])} for record in records]
    ending = path.suffix.lower()
    if ending == ".parquet":
        write_parquet(path, records)
    elif ending == ".jsonl":
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    else:
        memory = io.StringIO(newline="")
        writer: csv.DictWriter[str] = csv.DictWriter(memory, PREDICTION_COLUMNS)
        writer.writeheader()
        for record in records:
            lists = {key: json.dumps(record[key]) for key in ("top_labels", "top_probabilities")}
            writer.writerow({**record, **lists})
        write_text(path, memory.getvalue())


def printable_path(path: str) -> str:
    """Return a path as valid Unicode: bytes of a file's name that are not UTF-8 become `\\xe9` and the like."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_parquet(path: Path, records: list[dict]) -> None:
    """Write records as Parquet with stable column types, also when a column is empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    kinds = (text, text, number, pa.list_(text), pa.list_(number), text)
    table = pa.Table.from_pylist(records, schema=pa.schema(list(zip(PREDICTION_COLUMNS, kinds, strict=True))))
    with replacing(path) as draft:
        pq.write_table(table, draft)


def find_images(words: Iterable[str]) -> list[str]:
    """Return the images that files, folders and globs mean, in the order given; within one of them sorted.

    A file named outright is kept whatever its ending, also when it is missing: its row will say what is wrong.

    Raises:
        ValueError: a folder or a glob holds no image.
    """
    found: list[str] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = [str(path / each) for each in list_images(path, path)[0]]
            if not inside:
                raise ValueError(f"{word}: the folder holds no images")
            found += inside
        elif not path.exists() and any(mark in word for mark in "*?["):
            import glob

            inside = sorted(each for each in glob.glob(word, recursive=True) if Path(each).is_file())
            if not inside:
                raise ValueError(f"{word}: nothing matches")
            found += inside
        else:
            found.append(word)
    return found
