"""Tables of images: `.csv`, `.jsonl` and `.parquet` with the columns `path,label[,split][,group][,weight]`.

Rows are read one after the other and stored compactly, so that a table of a million rows takes a tenth of the memory of
its strings. Errors name the file and the line (in Parquet, the row) as an editor counts them.
"""

from __future__ import annotations

import math
import os
import posixpath
from array import array
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.data.cache.listings import read_listing, write_listing
from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS, FileDataset, ParquetDataset, file_identity, flip_reason
from vitrail.data.datasets.parquet import has_images, open_parquet
from vitrail.data.datasets.string_array import StringArray, first_repeated
from vitrail.data.datasets.table_readers import READERS, TableRows
from vitrail.data.problems import Problem
from vitrail.lookup import unknown

TABLE_ENDINGS = tuple(READERS)
TEXTS = ("label", "split", "group")
COLUMNS = ("path", *TEXTS, "weight")
COLUMN_SPLIT = "the column split:"
MIN_CACHED_ROWS = 20_000  # fewer are read in a tenth of a second


@dataclass
class Table:
    """The rows of a table, checked one by one.

    Attributes:
        location: path of the file, as messages show it.
        root: folder of the file, with a slash at its end.
        line_unit: what `lines` counts: line or row.
        columns: all columns of the file.
        lines: number of each row's line in the file.
        weights: loss weight of each row, where the table has such a column.
        names: for label and group, each text → its number, in order of first occurrence.
        codes: for label, split and group, the number of every row's text; -1 where a row has none.
        known: for each of the three, the texts as they are written → their numbers, so that each is checked once.
    """

    location: str
    root: str
    line_unit: str
    columns: tuple[str, ...]
    paths: StringArray = field(default_factory=StringArray)
    lines: array[int] = field(default_factory=lambda: array("q"))
    weights: array[float] = field(default_factory=lambda: array("d"))
    names: dict[str, dict[str, int]] = field(default_factory=lambda: {"label": {}, "group": {}})
    codes: dict[str, array[int]] = field(default_factory=lambda: {each: array("i") for each in TEXTS})
    known: dict[str, dict[str, int]] = field(default_factory=lambda: {each: {} for each in TEXTS})

    def fault(self, line: int, text: str) -> ValueError:
        """Return an error about a row."""
        return ValueError(f"{self.location}, {self.line_unit} {line}: {text}")

    def add(self, line: int, values: tuple[Any, ...], has: Collection[str]) -> None:
        """Check and add a row (path, label, split, group, weight).

        Args:
            has: the table's columns.

        Raises:
            ValueError: a value cannot be used.
        """
        path, label, split, group, weight = values
        try:
            self.paths.append(self.clean_path(line, path))
        except UnicodeEncodeError:
            raise self.fault(line, f"the path {path!r} is no Unicode text") from None
        self.lines.append(line)
        code = self.code(line, "label", label)
        if code < 0:
            raise self.fault(line, f"no label for {path!r}; write one, or remove the row")
        self.codes["label"].append(code)
        if "split" in has:
            self.codes["split"].append(self.code(line, "split", split))
        if "weight" in has:
            self.weights.append(self.weight(line, weight))
        self.codes["group"].append(-1 if group is None else self.code(line, "group", group))

    def code(self, line: int, column: str, value: Any) -> int:
        """Return the number of the text of a label, split or group; -1 where there is none."""
        if isinstance(value, str) and value in self.known[column]:
            return self.known[column][value]
        text = self.text(line, column, value)
        if column == "split":
            number = self.split_index(line, text)
        else:
            number = self.names[column].setdefault(text, len(self.names[column])) if text else -1
        if isinstance(value, str):
            self.known[column][value] = number
        return number

    def clean_path(self, line: int, path: Any) -> str:
        """Return a path relative to the table's folder where it lies below it, else absolute."""
        if not isinstance(path, str) or not path.strip():
            raise self.fault(line, "no path; write one, or remove the row" if not path else f"path {path!r} is no text")
        if "://" in path:
            raise self.fault(line, f"{path!r} is an address; only files are read, so copy it to this machine first")
        clean = posixpath.normpath(path) if "/." in path or "//" in path or path[0] == "." else path
        if clean.startswith(self.root):
            clean = clean[len(self.root) :]
        if clean == ".." or clean.startswith("../"):
            raise self.fault(
                line,
                f"{path!r} leads out of the table's folder {self.root}; write it as an absolute path, or put the table "
                "above its images",
            )
        return clean

    def text(self, line: int, column: str, value: Any) -> str:
        """Return a label, split or group as text, without blanks around it; whole numbers are written out."""
        if isinstance(value, str):
            return value.strip()
        if value is None:
            return ""
        if isinstance(value, int):
            return str(value)
        raise self.fault(line, f"{column} {value!r} is neither text nor a whole number; write it as text")

    def weight(self, line: int, value: Any) -> float:
        """Return the loss weight of a row."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise self.fault(
                line, f"weight {value!r} is no number above 0; write one, such as 1 or 0.5, or remove the column"
            )
        return number

    def split_index(self, line: int, text: str) -> int:
        """Return the index of a split's name in `SPLITS`."""
        if text.lower() in SPLIT_NAMES:
            return SPLITS.index(SPLIT_NAMES[text.lower()])
        if not text:
            raise self.fault(line, f"no split; write one of {', '.join(SPLITS)} in every row, or remove the column")
        raise self.fault(line, unknown("split", text, [*SPLITS, "valid", "validation"]))


def open_table(path: Path, *, limit_pixels: int, damaged: Literal["refuse", "keep"]) -> FileDataset | ParquetDataset:
    """List the images of a table. Class order is the sorted labels, as that of folders.

    Raises:
        ValueError: a column is missing, or a row cannot be used; the message names it.
    """
    if path.suffix.lower() == ".parquet" and has_images(path):
        return open_parquet([path], path.name, limit_pixels=limit_pixels, damaged=damaged)
    table = read_table(path)
    check_files(table)
    has_split = "split" in table.columns
    labels, targets, split = classes_of_rows(table, has_split)
    groups = np.asarray(table.codes["group"], dtype=np.int32) if "group" in table.columns else None
    problems = [
        *unread_columns(path, table.columns),
        *missing_classes(labels, targets, split),
    ]
    if split is not None and groups is not None:
        problems += groups_across_splits(list(table.names["group"]), np.asarray(table.codes["split"]), groups)
    return FileDataset(
        name=path.name,
        root=Path(table.root),
        labels=labels,
        paths=table.paths,
        targets=targets,
        split=split,
        groups=groups,
        weights=np.asarray(table.weights) if "weight" in table.columns else None,
        split_origin=COLUMN_SPLIT,
        problems=tuple(problems),
        flip_reason=flip_reason(labels),
        limit_pixels=limit_pixels,
        damaged=damaged,
    )


def read_table(path: Path) -> Table:
    """Return the checked rows of a table; those of a long one are stored in the cache folder.

    Raises:
        ValueError: a column is missing, or a row cannot be used.
    """
    root = os.path.join(os.path.abspath(path.parent), "")
    identity = file_identity(os.path.abspath(path)) or b""
    if cached := read_listing("tables", identity):
        arrays, (line_unit, columns, labels, groups) = cached
        return Table(
            str(path),
            root,
            line_unit,
            tuple(columns),
            paths=StringArray.from_arrays(arrays["names"], arrays["ends"]),
            lines=array("q", arrays["lines"].tobytes()),
            names={
                column: {text: number for number, text in enumerate(texts)}
                for column, texts in (("label", labels), ("group", groups))
            },
            codes={each: array("i", arrays[each].tobytes()) for each in TEXTS},
            weights=array("d", arrays["weights"].tobytes()),
        )
    rows = READERS[path.suffix.lower()](path, COLUMNS)
    check_columns(path, rows)
    check_unique_columns(path, rows)
    table = Table(str(path), root, rows.line_unit, rows.columns)
    with closing(rows.values) as values:
        for line, row in values:
            table.add(line, row, rows.columns)
    if not len(table.paths):
        raise ValueError(f"{path}: has no rows; expected a path and a label in each")
    check_unique_paths(table)
    if len(table.paths) >= MIN_CACHED_ROWS and file_identity(os.path.abspath(path)) == identity:
        names, ends = table.paths.arrays()
        arrays = {"names": names, "ends": ends, "lines": np.asarray(table.lines)}
        arrays["weights"] = np.asarray(table.weights)
        arrays |= {each: np.asarray(codes, dtype=np.int32) for each, codes in table.codes.items()}
        texts = [table.line_unit, table.columns, list(table.names["label"]), list(table.names["group"])]
        write_listing("tables", identity, arrays, texts)
    return table


def check_columns(path: Path, rows: TableRows) -> None:
    """Raise a ValueError unless there are the columns path and label."""
    for column in ("path", "label"):
        if column not in rows.columns:
            names = ", ".join(map(repr, rows.columns))
            clue = "; its columns seem to be separated by another sign than ','" if len(rows.columns) == 1 else ""
            raise ValueError(
                f"{path}: has no column {column!r}, but {names or 'none'}{clue}; expected a first line such as "
                f"{','.join(COLUMNS[:2])}, with the columns split, group and weight if wished"
                if rows.line_unit == "line" and path.suffix.lower() == ".csv"
                else f"{path}: has no column {column!r}, but {names or 'none'}; rename the column that holds it"
            )


def check_unique_columns(path: Path, rows: TableRows) -> None:
    """Raise a ValueError when a column that is read is there twice."""
    for column in COLUMNS:
        if rows.columns.count(column) > 1:
            raise ValueError(f"{path}: has the column {column!r} twice; rename one of them")


def check_unique_paths(table: Table) -> None:
    """Raise a ValueError when an image is listed twice."""
    if repeated := first_repeated(table.paths):
        first, second = repeated
        labels = list(table.names["label"])
        one, other = (labels[table.codes["label"][each]] for each in repeated)
        what = f"with the label {other!r}, there {one!r}" if one != other else "with the same label"
        raise table.fault(
            table.lines[second],
            f"{table.paths[second]!r} is in {table.line_unit} {table.lines[first]} already, {what}; remove one of them",
        )


def check_files(table: Table) -> None:
    """Raise a ValueError when the file of an image is missing."""
    missing = [
        index
        for index, path in enumerate(table.paths)
        if not os.path.isfile(path if path[0] == "/" else table.root + path)
    ]
    if missing:
        path = table.paths[missing[0]]
        others = f" ({len(missing):,} of {len(table.paths):,} files are missing)" if len(missing) > 1 else ""
        what = "is no file" if os.path.exists(os.path.join(table.root, path)) else "no such file"
        slashes = "; folders are separated by /" if "\\" in path else ""
        raise table.fault(
            table.lines[missing[0]],
            f"{path!r}: {what}{others}; paths are relative to the table's folder {table.root} or absolute{slashes}. "
            "Restore the files, or remove their rows",
        )


def classes_of_rows(table: Table, has_split: bool) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Return labels in class order, and the class and split of every row.

    Raises:
        ValueError: a split has a class that the training split does not have.
    """
    names, codes = list(table.names["label"]), np.asarray(table.codes["label"], dtype=np.int64)
    split = np.asarray(SPLITS)[np.asarray(table.codes["split"], dtype=np.int8)] if has_split else None
    known = np.unique(codes if split is None or "train" not in split else codes[split == "train"])
    labels = tuple(sorted(names[code] for code in known))
    targets = {label: target for target, label in enumerate(labels)}
    foreign = np.flatnonzero(~np.isin(codes, known))
    if len(foreign):
        assert split is not None
        row = int(foreign[0])
        raise table.fault(
            table.lines[row],
            f"{unknown('class', names[codes[row]], labels[:50])}. Split {split[row]!s} has it, but no row of train "
            f"({len(foreign):,} rows); add it to train, or remove these rows",
        )
    return labels, np.asarray([targets.get(name, -1) for name in names])[codes], split


def unread_columns(path: Path, columns: Sequence[str]) -> list[Problem]:
    """Return the problem that names the columns that are not read; none where all are."""
    extra = tuple(each for each in columns if each not in COLUMNS)
    if not extra:
        return []
    noun = "column" if len(extra) == 1 else "columns"
    matches = {column: get_close_matches(column.strip().lower(), COLUMNS, 1) for column in extra}
    clues = [f"{column!r} as {near[0]!r}" for column, near in matches.items() if near and near[0] not in columns]
    clue = f" (did you mean {', '.join(clues)}? Names are matched exactly)" if clues else ""
    return [Problem("warning", "name", extra, f"{path}: {noun} {', '.join(extra[:10])}: not read{clue}")]


def missing_classes(labels: tuple[str, ...], targets: np.ndarray, split: np.ndarray | None) -> list[Problem]:
    """Return a problem for each class of which val or test has no image."""
    problems = []
    for name in SPLITS[1:] if split is not None and "train" in split else ():
        in_split = targets[split == name]
        counts = np.bincount(in_split, minlength=len(labels))
        for label in np.flatnonzero(counts == 0) if len(in_split) else ():
            text = f"class {labels[label]!r} has no images in split {name}"
            problems.append(Problem("warning", "missing-class", (labels[label],), text))
    return problems


def groups_across_splits(names: Sequence[str], splits: np.ndarray, groups: np.ndarray) -> list[Problem]:
    """Return the problem of groups that have images in several of a dataset's own splits; none where no group has.

    Args:
        names: of the groups.
        splits, groups: [N] each image's index in `SPLITS` and in `names`, -1 for no group.
    """
    grouped = groups >= 0
    in_split = np.zeros((len(names), len(SPLITS)), dtype=bool)
    in_split[groups[grouped], splits[grouped]] = True
    across = np.flatnonzero(in_split.sum(axis=1) > 1)
    if not len(across):
        return []
    where = " and ".join(split for split, there in zip(SPLITS, in_split[across[0]], strict=True) if there)
    text = f"{len(across):,} groups are in more than one split, for instance {names[int(across[0])]!r} in {where}"
    return [Problem("warning", "leak", tuple(names[int(each)] for each in across), text)]
