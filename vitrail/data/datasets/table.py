"""Tables of images: `.csv`, `.jsonl` and `.parquet` with the columns `path,label[,split][,group][,weight]`.

Rows are read one after the other and kept compactly, so that a table of a million rows costs a tenth of what its
strings would. Errors name the file and the line (in Parquet, the row) as an editor counts them.
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
WORTH_KEEPING = 20_000  # rows; fewer are read in a tenth of a second


@dataclass
class Table:
    """The rows of a table, checked one by one.

    Attributes:
        columns: all columns of the file.
        lines: where each row stands in its file.
        weights: what each row counts in the loss, where the table has such a column.
        names: for label and group, each text → its number in the order met.
        codes: for label, split and group, the number of every row's text; -1 where a row has none.
        met: for each of the three, the texts as they are written → their numbers, so that each is checked once.
    """

    place: str
    root: str
    line_word: str
    columns: tuple[str, ...]
    paths: StringArray = field(default_factory=StringArray)
    lines: array[int] = field(default_factory=lambda: array("q"))
    weights: array[float] = field(default_factory=lambda: array("d"))
    names: dict[str, dict[str, int]] = field(default_factory=lambda: {"label": {}, "group": {}})
    codes: dict[str, array[int]] = field(default_factory=lambda: {each: array("i") for each in TEXTS})
    met: dict[str, dict[str, int]] = field(default_factory=lambda: {each: {} for each in TEXTS})

    def fault(self, line: int, text: str) -> ValueError:
        """Return an error about a row."""
        return ValueError(f"{self.place}, {self.line_word} {line}: {text}")

    def add(self, line: int, values: tuple[Any, ...], has: Collection[str]) -> None:
        """Check and keep a row (path, label, split, group, weight).

        Args:
            has: the table's columns.

        Raises:
            ValueError: a value cannot be used.
        """
        path, label, part, group, weight = values
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
            self.codes["split"].append(self.code(line, "split", part))
        if "weight" in has:
            self.weights.append(self.weight(line, weight))
        self.codes["group"].append(-1 if group is None else self.code(line, "group", group))

    def code(self, line: int, column: str, value: Any) -> int:
        """Return the number of a label's, part's or group's text, -1 where there is none."""
        if isinstance(value, str) and value in self.met[column]:
            return self.met[column][value]
        text = self.text(line, column, value)
        if column == "split":
            number = self.split(line, text)
        else:
            number = self.names[column].setdefault(text, len(self.names[column])) if text else -1
        if isinstance(value, str):
            self.met[column][value] = number
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
        """Return a label, split or group as text: blanks around it do not count, whole numbers are written out."""
        if isinstance(value, str):
            return value.strip()
        if value is None:
            return ""
        if isinstance(value, int):
            return str(value)
        raise self.fault(line, f"{column} {value!r} is neither text nor a whole number; write it as text")

    def weight(self, line: int, value: Any) -> float:
        """Return what a row counts in the loss."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise self.fault(
                line, f"weight {value!r} is no number above 0; write one, such as 1 or 0.5, or remove the column"
            )
        return number

    def split(self, line: int, text: str) -> int:
        """Return the number of a part's name."""
        if text.lower() in SPLIT_NAMES:
            return SPLITS.index(SPLIT_NAMES[text.lower()])
        if not text:
            raise self.fault(line, f"no split; write one of {', '.join(SPLITS)} in every row, or remove the column")
        raise self.fault(line, unknown("split", text, [*SPLITS, "valid", "validation"]))


def open_table(place: Path, *, limit_pixels: int, damaged: Literal["refuse", "keep"]) -> FileDataset | ParquetDataset:
    """List the images of a table. Class order is the sorted labels, as that of folders.

    Raises:
        ValueError: a column is missing, or a row cannot be used; the message names it.
    """
    if place.suffix.lower() == ".parquet" and has_images(place):
        return open_parquet([place], place.name, limit_pixels=limit_pixels, damaged=damaged)
    table = read_table(place)
    check_files(table)
    has_split = "split" in table.columns
    labels, targets, split = classes_of_rows(table, has_split)
    groups = np.asarray(table.codes["group"], dtype=np.int32) if "group" in table.columns else None
    problems = [
        *idle_columns(place, table.columns),
        *missing_classes(labels, targets, split),
    ]
    if split is not None and groups is not None:
        problems += torn_groups(list(table.names["group"]), np.asarray(table.codes["split"]), groups)
    return FileDataset(
        name=place.name,
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


def read_table(place: Path) -> Table:
    """Return the checked rows of a table; those of a long one are kept in the cache folder.

    Raises:
        ValueError: a column is missing, or a row cannot be used.
    """
    root = os.path.join(os.path.abspath(place.parent), "")
    identity = file_identity(os.path.abspath(place)) or b""
    if kept := read_listing("tables", identity):
        arrays, (line_word, columns, labels, groups) = kept
        return Table(
            str(place),
            root,
            line_word,
            tuple(columns),
            paths=StringArray.of(arrays["names"], arrays["ends"]),
            lines=array("q", arrays["lines"].tobytes()),
            names={
                key: {text: number for number, text in enumerate(each)}
                for key, each in (("label", labels), ("group", groups))
            },
            codes={each: array("i", arrays[each].tobytes()) for each in TEXTS},
            weights=array("d", arrays["weights"].tobytes()),
        )
    rows = READERS[place.suffix.lower()](place, COLUMNS)
    check_columns(place, rows)
    check_once(place, rows)
    table = Table(str(place), root, rows.line_word, rows.columns)
    with closing(rows.values) as values:
        for line, row in values:
            table.add(line, row, rows.columns)
    if not len(table.paths):
        raise ValueError(f"{place}: has no rows; expected a path and a label in each")
    check_twice(table)
    if len(table.paths) >= WORTH_KEEPING and file_identity(os.path.abspath(place)) == identity:
        names, ends = table.paths.arrays()
        arrays = {"names": names, "ends": ends, "lines": np.asarray(table.lines)}
        arrays["weights"] = np.asarray(table.weights)
        arrays |= {each: np.asarray(codes, dtype=np.int32) for each, codes in table.codes.items()}
        texts = [table.line_word, table.columns, list(table.names["label"]), list(table.names["group"])]
        write_listing("tables", identity, arrays, texts)
    return table


def check_columns(place: Path, rows: TableRows) -> None:
    """Raise a ValueError unless there are columns path and label."""
    for column in ("path", "label"):
        if column not in rows.columns:
            names = ", ".join(map(repr, rows.columns))
            clue = "; its columns seem to be divided by another sign than ','" if len(rows.columns) == 1 else ""
            raise ValueError(
                f"{place}: has no column {column!r}, but {names or 'none'}{clue}; expected a first line such as "
                f"{','.join(COLUMNS[:2])}, with the columns split, group and weight if wished"
                if rows.line_word == "line" and place.suffix.lower() == ".csv"
                else f"{place}: has no column {column!r}, but {names or 'none'}; rename the column that holds it"
            )


def check_once(place: Path, rows: TableRows) -> None:
    """Raise a ValueError when a column that is read is there twice."""
    for column in COLUMNS:
        if rows.columns.count(column) > 1:
            raise ValueError(f"{place}: has the column {column!r} twice; rename one of them")


def check_twice(table: Table) -> None:
    """Raise a ValueError when an image is named twice."""
    if twice := first_repeated(table.paths):
        first, second = twice
        labels = list(table.names["label"])
        one, other = (labels[table.codes["label"][each]] for each in twice)
        what = f"with the label {other!r}, there {one!r}" if one != other else "with the same label"
        raise table.fault(
            table.lines[second],
            f"{table.paths[second]!r} is in {table.line_word} {table.lines[first]} already, {what}; remove one of them",
        )


def check_files(table: Table) -> None:
    """Raise a ValueError when an image is not there."""
    gone = [
        index
        for index, path in enumerate(table.paths)
        if not os.path.isfile(path if path[0] == "/" else table.root + path)
    ]
    if gone:
        path = table.paths[gone[0]]
        others = f" ({len(gone):,} of {len(table.paths):,} files are missing)" if len(gone) > 1 else ""
        what = "is no file" if os.path.exists(os.path.join(table.root, path)) else "no such file"
        slashes = "; folders are divided by /" if "\\" in path else ""
        raise table.fault(
            table.lines[gone[0]],
            f"{path!r}: {what}{others}; paths are relative to the table's folder {table.root} or absolute{slashes}. "
            "Restore the files, or remove their rows",
        )


def classes_of_rows(table: Table, has_split: bool) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Return labels in class order, the class of every row, and its part.

    Raises:
        ValueError: a part has a class that training does not know.
    """
    names, codes = list(table.names["label"]), np.asarray(table.codes["label"], dtype=np.int64)
    split = np.asarray(SPLITS)[np.asarray(table.codes["split"], dtype=np.int8)] if has_split else None
    known = np.unique(codes if split is None or "train" not in split else codes[split == "train"])
    labels = tuple(sorted(names[code] for code in known))
    place = {label: target for target, label in enumerate(labels)}
    foreign = np.flatnonzero(~np.isin(codes, known))
    if len(foreign):
        assert split is not None
        row = int(foreign[0])
        raise table.fault(
            table.lines[row],
            f"{unknown('class', names[codes[row]], labels[:50])}. Part {split[row]!s} has it, but no row of train "
            f"({len(foreign):,} rows); add it to train, or remove these rows",
        )
    return labels, np.asarray([place.get(name, -1) for name in names])[codes], split


def idle_columns(place: Path, columns: Sequence[str]) -> list[Problem]:
    """Name the columns that nothing reads, in one line."""
    extra = tuple(each for each in columns if each not in COLUMNS)
    if not extra:
        return []
    word = "column" if len(extra) == 1 else "columns"
    meant = {each: get_close_matches(each.strip().lower(), COLUMNS, 1) for each in extra}
    clues = [f"{each!r} as {found[0]!r}" for each, found in meant.items() if found and found[0] not in columns]
    clue = f" (did you mean {', '.join(clues)}? Names are read as they stand here)" if clues else ""
    return [Problem("warning", "name", extra, f"{place}: {word} {', '.join(extra[:10])}: not read{clue}")]


def missing_classes(labels: tuple[str, ...], targets: np.ndarray, split: np.ndarray | None) -> list[Problem]:
    """Name the classes that a given part lacks."""
    problems = []
    for part in SPLITS[1:] if split is not None and "train" in split else ():
        here = targets[split == part]
        counts = np.bincount(here, minlength=len(labels))
        for label in np.flatnonzero(counts == 0) if len(here) else ():
            text = f"class {labels[label]!r} has no images in split {part}"
            problems.append(Problem("warning", "missing-class", (labels[label],), text))
    return problems


def torn_groups(names: Sequence[str], parts: np.ndarray, groups: np.ndarray) -> list[Problem]:
    """Say when a source's own parts divide a group.

    Args:
        names: of the groups.
        parts, groups: [N] each image's number in `PARTS` and in `names`, -1 for no group.
    """
    grouped = groups >= 0
    met = np.zeros((len(names), len(SPLITS)), dtype=bool)
    met[groups[grouped], parts[grouped]] = True
    torn = np.flatnonzero(met.sum(axis=1) > 1)
    if not len(torn):
        return []
    where = " and ".join(part for part, there in zip(SPLITS, met[torn[0]], strict=True) if there)
    text = f"{len(torn):,} groups are in more than one part, for instance {names[int(torn[0])]!r} in {where}"
    return [Problem("warning", "leak", tuple(names[int(each)] for each in torn), text)]
