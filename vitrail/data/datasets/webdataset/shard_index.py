"""The index of one shard: offset, class, split, group and weight of each image; stored in the cache folder.

A sample is a run of files that share a key, which is the path up to the first dot of the file's name
(WebDataset's convention): `a/7.jpg`, `a/7.cls`, `a/7.json`.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.cache.listings import read_listing, write_listing
from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS
from vitrail.data.datasets.string_array import StringArray, first_repeated
from vitrail.data.datasets.webdataset.tar import Member, TarReader
from vitrail.data.images.decode import ENDINGS
from vitrail.lookup import unknown

_LONGEST_SIDE_FILE = 1 << 20  # bytes of a .cls or .json
_MOST_UNREAD = 30
_SKIPPED = re.compile(r"__[^/]*__($|/)|__MACOSX/")  # names that WebDataset's readers skip, and that macOS adds
_TYPE_CODES = {
    "starts": "q",
    "sizes": "q",
    "codes": "i",
    "splits": "b",
    "groups": "i",
    "weights": "d",
}  # of the arrays, as the module `array` names them
READ_KEYS = ("label", "split", "group", "weight")
OWN_KEYS = ("path",)  # written by `vitrail shard` too, for people


class ClassMarks(NamedTuple):
    """The texts by which a sample gives its class; empty where it has none.

    Attributes:
        label: `label` in its .json.
        cls: its .cls.
        folder: the folders in its key, where it has neither.
    """

    label: str
    cls: str
    folder: str

    @property
    def kind(self) -> str:
        """Return which of the three gives the class."""
        return ".json" if self.label else ".cls" if self.cls else "folder"


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard.

    Attributes:
        paths: [N] names in the tar.
        starts, sizes: [N] offset and length, bytes.
        marks: the different class marks.
        codes: [N] index of each image's mark in `marks`.
        splits: [N] index of each image's split in `SPLITS`, -1 where its .json has none.
        groups: [N] index of each image's group in `group_names`, -1 for none.
        weights: [N] loss weights, NaN where the .json has none.
        unread: names of the content of the tar that is not read.
    """

    paths: StringArray
    starts: np.ndarray
    sizes: np.ndarray
    codes: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    weights: np.ndarray
    marks: list[ClassMarks]
    group_names: list[str]
    unread: list[str]


def load_index(file: str, location: str, identity: bytes) -> ShardIndex:
    """Return the index of a shard, from the cache folder where it is there.

    Args:
        location: path or address of the shard, as messages show it.
        identity: bytes that change when the file does.

    Raises:
        ValueError: the file is no whole tar, or a sample in it cannot be used; the message names it.
    """
    if cached := read_listing("shards", identity):
        arrays, (marks, group_names, unread) = cached
        return ShardIndex(
            paths=StringArray.from_arrays(arrays["names"], arrays["ends"]),
            **{name: arrays[name] for name in _TYPE_CODES},
            marks=[ClassMarks(*mark) for mark in marks],
            group_names=group_names,
            unread=unread,
        )
    with TarReader(file, location) as tar:
        index = _IndexBuilder(tar).build()
    names, ends = index.paths.arrays()
    arrays = {"names": names, "ends": ends} | {name: getattr(index, name) for name in _TYPE_CODES}
    write_listing("shards", identity, arrays, [index.marks, index.group_names, index.unread])
    return index


@dataclass
class _Sample:
    """The files of one key, while they are collected."""

    key: str
    first: str
    images: list[Member] = field(default_factory=list)
    others: list[Member] = field(default_factory=list)  # images such as x.mask.png, used where there is no x.png
    cls: str = ""
    json: dict[str, Any] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)


class _IndexBuilder:
    """Builds the index of a tar."""

    def __init__(self, tar: TarReader) -> None:
        self.tar, self.paths, self.keys = tar, StringArray(), StringArray()
        self.columns = {name: array(code) for name, code in _TYPE_CODES.items()}
        self.marks: dict[ClassMarks, int] = {}
        self.group_names: dict[str, int] = {}
        self.unread: dict[str, None] = {}

    def fault(self, name: str, text: str) -> ValueError:
        """Return an error about a file in the tar."""
        return ValueError(f"{self.tar.location}: {name}: {text}")

    def build(self) -> ShardIndex:
        """Read all headers of the tar and return its index."""
        sample = None
        for member in self.tar.members():
            name = self.clean_name(member.name)
            folder, slash, base = name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not stem or not dot or _SKIPPED.match(name):
                self.note_unread(base if stem else "")
                continue
            key = folder + slash + stem
            if sample is None or key != sample.key:
                self.finish(sample)
                sample = _Sample(key, name)
            self.add(sample, ending.lower(), Member(name, member.start, member.size))
        self.finish(sample)
        if not len(self.paths):
            raise ValueError(f"{self.tar.location}: holds no samples; leave it out")
        if repeated := first_repeated(self.keys):
            name = self.paths[repeated[1]]
            raise self.fault(
                name,
                f"its key {self.keys[repeated[1]]!r} was there before, with other samples between; the files of a sample must "
                "follow each other, and each sample have a key of its own (GNU tar: --sort=name)",
            )
        arrays = {name: np.asarray(values) for name, values in self.columns.items()}
        return ShardIndex(
            self.paths, **arrays, marks=list(self.marks), group_names=list(self.group_names), unread=sorted(self.unread)
        )

    def clean_name(self, name: str) -> str:
        """Return a name without a leading `/` or `./`."""
        clean = name.lstrip("/") if name.startswith("/") else name
        while clean.startswith("./"):
            clean = clean[2:]
        if ".." in clean.split("/"):
            raise self.fault(name, "leads out of the shard (..); write the shard anew with plain names")
        return clean

    def note_unread(self, name: str) -> None:
        """Remember the name of something that is not read."""
        if name and len(self.unread) < _MOST_UNREAD:
            self.unread[name] = None

    def add(self, sample: _Sample, ending: str, member: Member) -> None:
        """Add a file to a sample."""
        if ending in sample.endings:
            raise self.fault(member.name, "is there twice; keep one of them")
        sample.endings.add(ending)
        if ending in ENDINGS:
            sample.images.append(member)
        elif ending.rpartition(".")[2] in ENDINGS:
            sample.others.append(member)
        elif ending == "cls":
            sample.cls = self.text(member).strip()
            if not sample.cls:
                raise self.fault(member.name, "is empty; write the class's number or name")
        elif ending == "json":
            try:
                sample.json = json.loads(self.text(member))
            except ValueError as error:
                raise self.fault(member.name, f"is no JSON ({error})") from None
            if not isinstance(sample.json, dict):
                raise self.fault(member.name, 'is no object; expected such as {"label": "cat"}')
        else:
            self.note_unread(f".{ending}")

    def text(self, member: Member) -> str:
        """Return the text of a small file."""
        if member.size > _LONGEST_SIDE_FILE:
            raise self.fault(member.name, f"has {member.size:,} bytes; expected a few")
        try:
            return self.tar.read(member.start, member.size).decode()
        except UnicodeDecodeError as error:
            raise self.fault(member.name, f"is not UTF-8 ({error.reason})") from None

    def finish(self, sample: _Sample | None) -> None:
        """Add a sample, of which all files have been read, to the index."""
        if sample is None:
            return
        images = sample.images or sample.others
        for other in sample.others if sample.images else ():
            self.note_unread("." + os.path.basename(other.name).partition(".")[2])
        if not images:
            raise self.fault(
                sample.first,
                f"the sample {sample.key!r} has no image, but {', '.join(f'.{each}' for each in sorted(sample.endings))}",
            )
        if len(images) > 1:
            raise self.fault(
                sample.first,
                f"the sample {sample.key!r} has {len(images)} images ({', '.join(each.name for each in images)}); a "
                "name counts up to its first dot, so give each image a name of its own before it",
            )
        name, start, size = images[0]
        mark = self.class_of(sample, name)
        self.keys.append(sample.key)
        self.paths.append(name)
        self.columns["starts"].append(start)
        self.columns["sizes"].append(size)
        self.columns["codes"].append(self.marks.setdefault(mark, len(self.marks)))
        self.columns["splits"].append(self.split_of(sample, name))
        group = self.json_text(sample, name, "group")
        self.columns["groups"].append(self.group_names.setdefault(group, len(self.group_names)) if group else -1)
        self.columns["weights"].append(self.weight_of(sample, name))
        for key in sample.json.keys() - {*READ_KEYS, *OWN_KEYS} if sample.json else ():
            self.note_unread(f"{key} in .json")

    def class_of(self, sample: _Sample, name: str) -> ClassMarks:
        """Return the class marks of a sample."""
        label, cls = self.json_text(sample, name, "label"), sample.cls
        folder = "" if label or cls else name.rpartition("/")[0]
        if label or cls or folder:
            return ClassMarks(label, cls, folder)
        raise self.fault(
            name,
            f"has no label; expected {sample.key}.cls with a number or name, {sample.key}.json with a label, or a folder of "
            "the class's name",
        )

    def json_text(self, sample: _Sample, name: str, key: str) -> str:
        """Return a value of a sample's .json as text, empty where there is none."""
        value = sample.json.get(key) if sample.json else None
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise self.fault(name, f"{key} {value!r} in its .json is neither text nor a whole number; write it as text")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise self.fault(name, f"{key} {value!r} in its .json is no Unicode text") from None
        return str(value).strip()

    def weight_of(self, sample: _Sample, name: str) -> float:
        """Return the loss weight in a sample's .json, NaN where it has none."""
        value = sample.json.get("weight")
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.fault(name, f"weight {value!r} in its .json is no number above 0; write one, such as 1 or 0.5")
        return float(value)

    def split_of(self, sample: _Sample, name: str) -> int:
        """Return the index in `SPLITS` of the split in a sample's .json, -1 where it has none."""
        split = self.json_text(sample, name, "split")
        if not split:
            return -1
        if split.lower() not in SPLIT_NAMES:
            raise self.fault(name, f"in its .json: {unknown('split', split, [*SPLITS, 'valid', 'validation'])}")
        return SPLITS.index(SPLIT_NAMES[split.lower()])
