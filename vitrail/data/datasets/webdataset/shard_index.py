"""What one shard holds: the place of each image in the tar, and all that is said of it; kept in the cache folder.

A sample is the files that follow each other and share a key, which is the path up to the first dot of the file's name
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
_NOTES = re.compile(r"__[^/]*__($|/)|__MACOSX/")  # what WebDataset's readers skip, and what macOS adds
_NUMBERS = {
    "starts": "q",
    "sizes": "q",
    "codes": "i",
    "splits": "b",
    "groups": "i",
    "weights": "d",
}  # as `array` writes their forms
READ_KEYS = ("label", "split", "group", "weight")
OWN_KEYS = ("path",)  # what `vitrail shard` writes besides, for people


class ClassMarks(NamedTuple):
    """What a sample says of its class; empty where it says nothing.

    Attributes:
        label: `label` in its .json.
        cls: its .cls.
        folder: the folders in its key, where neither is there.
    """

    label: str
    cls: str
    folder: str

    @property
    def kind(self) -> str:
        """Where the class is read."""
        return ".json" if self.label else ".cls" if self.cls else "folder"


@dataclass(frozen=True)
class ShardIndex:
    """The images of a shard.

    Attributes:
        paths: their names in the tar.
        starts, sizes: first byte and length of each.
        said: what is said of classes, each different thing once.
        codes: for each image its number in `said`.
        parts: for each image its number in `PARTS`, -1 where its .json has no split.
        groups: for each image its number in `group_names`, -1 for none.
        weights: what each image counts in the loss, NaN where its .json has no weight.
        unread: what is in the tar and is not read.
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


def load_index(file: str, place: str, identity: bytes) -> ShardIndex:
    """Return the index of a shard; it is made on the first call.

    Args:
        place: what messages call the shard.
        identity: what changes when the file does.

    Raises:
        ValueError: the file is no whole tar, or a sample in it cannot be used; the message names it.
    """
    if kept := read_listing("shards", identity):
        arrays, (said, group_names, unread) = kept
        return ShardIndex(
            paths=StringArray.of(arrays["names"], arrays["ends"]),
            **{each: arrays[each] for each in _NUMBERS},
            marks=[ClassMarks(*each) for each in said],
            group_names=group_names,
            unread=unread,
        )
    with TarReader(file, place) as tar:
        found = _IndexBuilder(tar).index()
    names, ends = found.paths.arrays()
    arrays = {"names": names, "ends": ends} | {each: getattr(found, each) for each in _NUMBERS}
    write_listing("shards", identity, arrays, [found.marks, found.group_names, found.unread])
    return found


@dataclass
class _Sample:
    """The files of one key, while they are met."""

    key: str
    first: str
    images: list[Member] = field(default_factory=list)
    others: list[Member] = field(default_factory=list)  # images such as x.mask.png, which count where there is no x.png
    cls: str = ""
    json: dict[str, Any] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)


class _IndexBuilder:
    """Makes the index of a tar."""

    def __init__(self, tar: TarReader) -> None:
        self.tar, self.paths, self.keys = tar, StringArray(), StringArray()
        self.numbers = {name: array(form) for name, form in _NUMBERS.items()}
        self.said: dict[ClassMarks, int] = {}
        self.group_names: dict[str, int] = {}
        self.unread: dict[str, None] = {}

    def fault(self, name: str, text: str) -> ValueError:
        """Return an error about a file in the tar."""
        return ValueError(f"{self.tar.place}: {name}: {text}")

    def index(self) -> ShardIndex:
        """Walk the tar."""
        sample = None
        for member in self.tar.members():
            name = self.clean(member.name)
            folder, slash, base = name.rpartition("/")
            stem, dot, ending = base.partition(".")
            if not stem or not dot or _NOTES.match(name):
                self.note(base if stem else "")
                continue
            key = folder + slash + stem
            if sample is None or key != sample.key:
                self.finish(sample)
                sample = _Sample(key, name)
            self.add(sample, ending.lower(), Member(name, member.start, member.size))
        self.finish(sample)
        if not len(self.paths):
            raise ValueError(f"{self.tar.place}: holds no samples; leave it out")
        if twice := first_repeated(self.keys):
            name = self.paths[twice[1]]
            raise self.fault(
                name,
                f"its key {self.keys[twice[1]]!r} was there before, with other samples between; the files of a sample must "
                "follow each other, and each sample have a key of its own (GNU tar: --sort=name)",
            )
        arrays = {name: np.asarray(values) for name, values in self.numbers.items()}
        return ShardIndex(
            self.paths, **arrays, marks=list(self.said), group_names=list(self.group_names), unread=sorted(self.unread)
        )

    def clean(self, name: str) -> str:
        """Return a name without what stands for the tar's own folder."""
        clean = name.lstrip("/") if name.startswith("/") else name
        while clean.startswith("./"):
            clean = clean[2:]
        if ".." in clean.split("/"):
            raise self.fault(name, "leads out of the shard (..); write the shard anew with plain names")
        return clean

    def note(self, what: str) -> None:
        """Remember what is not read."""
        if what and len(self.unread) < _MOST_UNREAD:
            self.unread[what] = None

    def add(self, sample: _Sample, ending: str, member: Member) -> None:
        """Take a file of a sample."""
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
            self.note(f".{ending}")

    def text(self, member: Member) -> str:
        """Return what a small file says."""
        if member.size > _LONGEST_SIDE_FILE:
            raise self.fault(member.name, f"has {member.size:,} bytes; expected a few")
        try:
            return self.tar.read(member.start, member.size).decode()
        except UnicodeDecodeError as error:
            raise self.fault(member.name, f"is not UTF-8 ({error.reason})") from None

    def finish(self, sample: _Sample | None) -> None:
        """Keep a sample whose files have all been met."""
        if sample is None:
            return
        images = sample.images or sample.others
        for other in sample.others if sample.images else ():
            self.note("." + os.path.basename(other.name).partition(".")[2])
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
        said = self.class_of(sample, name)
        self.keys.append(sample.key)
        self.paths.append(name)
        self.numbers["starts"].append(start)
        self.numbers["sizes"].append(size)
        self.numbers["codes"].append(self.said.setdefault(said, len(self.said)))
        self.numbers["splits"].append(self.split_of(sample, name))
        group = self.word(sample, name, "group")
        self.numbers["groups"].append(self.group_names.setdefault(group, len(self.group_names)) if group else -1)
        self.numbers["weights"].append(self.weight_of(sample, name))
        for key in sample.json.keys() - {*READ_KEYS, *OWN_KEYS} if sample.json else ():
            self.note(f"{key} in .json")

    def class_of(self, sample: _Sample, name: str) -> ClassMarks:
        """Return what a sample says of its class."""
        label, cls = self.word(sample, name, "label"), sample.cls
        folder = "" if label or cls else name.rpartition("/")[0]
        if label or cls or folder:
            return ClassMarks(label, cls, folder)
        raise self.fault(
            name,
            f"has no label; expected {sample.key}.cls with a number or name, {sample.key}.json with a label, or a folder of "
            "the class's name",
        )

    def word(self, sample: _Sample, name: str, key: str) -> str:
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
        """Return what a sample's .json says that it counts in the loss, NaN where it says nothing."""
        value = sample.json.get("weight")
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.fault(name, f"weight {value!r} in its .json is no number above 0; write one, such as 1 or 0.5")
        return float(value)

    def split_of(self, sample: _Sample, name: str) -> int:
        """Return the number of the part that a sample's .json tells, -1 where it tells none."""
        word = self.word(sample, name, "split")
        if not word:
            return -1
        if word.lower() not in SPLIT_NAMES:
            raise self.fault(name, f"in its .json: {unknown('split', word, [*SPLITS, 'valid', 'validation'])}")
        return SPLITS.index(SPLIT_NAMES[word.lower()])
