"""Readers of `.csv`, `.jsonl` and `.parquet` tables: row by row, with the number of the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BATCH = 65_536


@dataclass(frozen=True)
class TableRows:
    """The columns of a table, and an iterator over its rows.

    Attributes:
        columns: all its columns.
        values: for each row the number of its line and the values of the wanted columns, None for a missing column.
        line_unit: what that number counts: line or row.
    """

    columns: tuple[str, ...]
    values: Generator[tuple[int, tuple[Any, ...]]]
    line_unit: str


def csv_rows(path: Path, wanted: tuple[str, ...]) -> TableRows:
    """Read comma-separated values: UTF-8 with or without a mark, quotes doubled inside quotes, blank lines left out.

    Raises:
        ValueError: the file is no such table; while iterating too.
    """

    def lines() -> Generator[tuple[int, list[str]]]:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except UnicodeDecodeError as error:
                raise not_utf8(path, error) from None
            except csv.Error as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {error}; a quoted value ends with a quote, and a quote inside is "
                    "doubled"
                ) from None

    with closing(lines()) as beginning:
        header = [name.strip() for name in next(beginning, (0, []))[1]]

    def values() -> Generator[tuple[int, tuple[Any, ...]]]:
        chosen = [header.index(name) if name in header else len(header) for name in wanted]
        with closing(lines()) as rows:
            next(rows)
            for number, row in rows:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {number}: has {len(row)} values, but there are {len(header)} columns "
                        f"({', '.join(header)}); a value that holds a comma must stand in quotes"
                    )
                cells = [*row, None]  # None is the value of a missing column
                yield number, tuple([cells[each] for each in chosen])

    return TableRows(tuple(header), values(), "line")


def jsonl_rows(path: Path, wanted: tuple[str, ...]) -> TableRows:
    """Read one JSON object a line; the columns are the keys of the first.

    Raises:
        ValueError: a line is no JSON object; while iterating too.
    """

    def objects() -> Generator[tuple[int, dict[str, Any]]]:
        try:
            with path.open(encoding="utf-8-sig") as handle:
                for number, line in enumerate(handle, 1):
                    if not line.isspace():
                        yield number, parse(number, line)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from None

    def parse(number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no JSON ({error}); expected one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{path}, line {number}: is no object; expected such as {{"path": "a.jpg", "label": "cat"}}'
            )
        return row

    with closing(objects()) as beginning:
        columns = tuple(next(beginning, (0, {}))[1])
    optional = frozenset(wanted) - frozenset(columns)

    def values() -> Generator[tuple[int, tuple[Any, ...]]]:
        with closing(objects()) as rows:
            for number, row in rows:
                if not optional.isdisjoint(row):
                    late = ", ".join(sorted(optional & row.keys()))
                    raise ValueError(
                        f"{path}, line {number}: has {late}, which the first line has not; write it in every line (null "
                        "for no group), or in none"
                    )
                yield number, tuple([row.get(name) for name in wanted])

    return TableRows(columns, values(), "line")


def parquet_rows(path: Path, wanted: tuple[str, ...]) -> TableRows:
    """Read the wanted columns of a Parquet file, a batch of rows at a time.

    Raises:
        ValueError: the file is no Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        columns = tuple(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is no readable Parquet file ({error})") from None
    present = [name for name in wanted if name in columns]

    def values() -> Generator[tuple[int, tuple[Any, ...]]]:
        start = 1
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=present):
                nothing = [None] * len(batch)
                cells = [batch.column(name).to_pylist() if name in present else nothing for name in wanted]
                yield from enumerate(zip(*cells, strict=True), start)
                start += len(batch)
        pyarrow.default_memory_pool().release_unused()

    return TableRows(columns, values(), "row")


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    """Return the error of a file in another encoding."""
    return ValueError(f"{path}: is not UTF-8 ({error.reason} {error.object[error.start]:#04x}); save it as UTF-8")


READERS: dict[str, Callable[[Path, tuple[str, ...]], TableRows]] = {
    ".csv": csv_rows,
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
}
