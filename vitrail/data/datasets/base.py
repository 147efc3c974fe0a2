"""Where a source's images lie: in files of their own, in arrays, or many together in one file."""

from __future__ import annotations

import abc
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import PIL.Image

from vitrail.data.images.decode import ImageError, read_image
from vitrail.data.problems import Problem

SPLIT_BY_FOLDERS = "the folders"  # what divides a source that has train/ val/ test/

SPLITS = ("train", "val", "test")
# In any case of letters: Train/ and Test/ must not silently be read as two classes.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """What every source knows of its images before it reads one; `Source` says what each field means."""

    name: str
    labels: tuple[str, ...]
    paths: Sequence[str]
    targets: np.ndarray
    split: np.ndarray | None = None
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    split_origin: str = SPLIT_BY_FOLDERS
    problems: tuple[Problem, ...] = ()
    flip_reason: str = ""
    limit_pixels: int = 100_000_000


@dataclass(frozen=True, kw_only=True)
class FileDataset(ImageDataset):
    """Images in files of their own: class folders, tables, and datasets that are unpacked to files.

    Attributes:
        root: what `paths` are relative to; a path that is absolute stays so.
    """

    root: Path
    damaged: Literal["refuse", "keep"]

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return read_image(
            self.root / self.paths[index], mode=mode, limit_pixels=self.limit_pixels, damaged=self.damaged
        )

    def encoded(self, index: int) -> bytes:
        return (self.root / self.paths[index]).read_bytes()

    def location(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def identity(self, index: int) -> bytes | None:
        return file_identity(os.path.abspath(self.root / self.paths[index]))

    def strict(self) -> FileDataset:
        return replace(self, damaged="refuse")


@dataclass(frozen=True, kw_only=True)
class ArrayDataset(ImageDataset):
    """Images that are arrays already, uint8 [N, H, W] grey or [N, H, W, 3] colour, one array after the other."""

    arrays: tuple[np.ndarray, ...]

    def pixels(self, index: int) -> np.ndarray:
        """Return one image's own pixels, not a copy."""
        for array in self.arrays:
            if index < len(array):
                return array[index]
            index -= len(array)
        raise IndexError(f"{self.name}: image {index} after the last")

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.pixels(index)).convert(mode)

    def encoded(self, index: int) -> bytes:
        with io.BytesIO() as file:
            PIL.Image.fromarray(self.pixels(index)).save(file, "PNG")
            return file.getvalue()

    def location(self, index: int) -> str:
        return self.paths[index]

    def identity(self, index: int) -> bytes | None:
        pixels = self.pixels(index)
        return f"{pixels.shape}".encode() + pixels.tobytes()

    def strict(self) -> ArrayDataset:
        return self


@dataclass(frozen=True, kw_only=True)
class EncodedDataset(ImageDataset, abc.ABC):
    """Images that are stored one after the other in files of many."""

    damaged: Literal["refuse", "keep"]

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """Return one image as it is stored."""

    @abc.abstractmethod
    def location(self, index: int) -> str:
        """Return where one image is, for people."""

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return read_image(
            self.encoded(index),
            mode=mode,
            limit_pixels=self.limit_pixels,
            damaged=self.damaged,
            name=self.location(index),
        )

    def strict(self) -> Self:
        return replace(self, damaged="refuse")


@dataclass(frozen=True, kw_only=True)
class ParquetDataset(EncodedDataset):
    """Encoded images one after the other in a file that is mapped into memory, not read into it.

    Attributes:
        packed: the file's bytes.
        starts: [N + 1] where each image begins, and the end of the last.
    """

    content: np.ndarray
    starts: np.ndarray

    def encoded(self, index: int) -> bytes:
        return self.content[self.starts[index] : self.starts[index + 1]].tobytes()

    def location(self, index: int) -> str:
        return f"{self.name}: {self.paths[index]}"

    def identity(self, index: int) -> bytes | None:
        return hashlib.blake2b(self.encoded(index), digest_size=16).digest()


@dataclass(frozen=True)
class TarShard:
    """A tar of images on this machine.

    Attributes:
        word: its path or address, as it was asked for.
        stem: what the paths of its images begin with.
        file: where its bytes are: itself, or a copy in the cache folder.
        state: length in bytes and instant of the last write (ns), when it was listed.
        identity: what changes when its content does.
    """

    word: str
    stem: str
    file: str
    state: tuple[int, int]
    identity: bytes


@dataclass(frozen=True, kw_only=True)
class TarDataset(EncodedDataset):
    """Images in tars, each read from its place.

    A tar is opened for each image: held open, or mapped, a thousand of them would use up a process's files, and a
    mapped file that is cut off kills the process instead of raising an error.

    Attributes:
        shards: in the order of their images.
        firsts: [S] the number of each shard's first image.
        starts, sizes: [N] first byte and length of each image in its shard.
    """

    shards: tuple[TarShard, ...]
    firsts: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def shard(self, index: int) -> int:
        """Return the number of the shard that holds an image."""
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def encoded(self, index: int) -> bytes:
        shard, size = self.shards[self.shard(index)], int(self.sizes[index])
        with open(shard.file, "rb", buffering=0) as handle:
            found = os.fstat(handle.fileno())
            if (found.st_size, found.st_mtime_ns) != shard.state:
                raise ValueError(f"{shard.word}: was changed after it was listed; start again")
            handle.seek(int(self.starts[index]))
            content = handle.read(size)
            while 0 < len(content) < size and (more := handle.read(size - len(content))):
                content += more
            return content

    def location(self, index: int) -> str:
        shard = self.shards[self.shard(index)]
        return f"{shard.word}: {self.paths[index].removeprefix(shard.stem + '/')}"

    def identity(self, index: int) -> bytes | None:
        return b"%b\0%d %d" % (self.shards[self.shard(index)].identity, self.starts[index], self.sizes[index])


def file_identity(place: str) -> bytes | None:
    """Return path, size, instants of writing and change, and number of a file, or None where there is none."""
    try:
        found = os.stat(place)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # Copying can set back the time of writing, not that of the change, nor the file's number.
    state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    return f"{place}\0{state}".encode("utf-8", "surrogateescape")


def flip_reason(labels: Sequence[str]) -> str:
    """Say why images of these classes must not be mirrored, from the names; empty when they may."""
    if all(len(label) == 1 and label.isalnum() for label in labels):
        return "the classes are single letters or digits, and a mirrored sign is another sign"
    sides = [
        label
        for label in labels
        if {"left", "right"} & set(label.lower().replace("-", "_").replace(" ", "_").split("_"))
    ]
    if sides:
        return f"class {sides[0]!r} names a side, which mirroring would change"
    return ""


def broken_image(dataset: Dataset, index: int, error: ImageError | OSError, damaged: str) -> Problem:
    """Describe a broken file: an error unless the user chose to go on without it."""
    severity = "error" if damaged == "stop" else "warning"
    verdict = error.info.verdict if isinstance(error, ImageError) else "unreadable"
    assert verdict != "ok"
    remedy = "Mend or remove it, or go on without such files by --data.damaged drop"
    fate = {"stop": remedy, "drop": "It is left out", "keep": "What can be decoded is kept; else it is left out"}
    message = f"{error}. {fate[damaged]}"
    return Problem(severity, verdict, (dataset.paths[index],), message)


@runtime_checkable
class Dataset(Protocol):
    """Labelled images, listed but not yet read.

    Attributes:
        name: what the user called it, for messages and file names.
        labels: class names in class order.
        paths: one identifying path per image, relative to the source, `/` between parts.
        targets: [N] class index of every image.
        split: name of the part (train, val, test) of every image where the source has parts, or None.
        groups: [N] number of the group that the source puts each image in, -1 for none; or None. Images of one group
            (one patient, one video) are never divided.
        weights: [N] what the source says that each image counts in the training's loss, above 0; or None.
        split_origin: what the parts are, for people, such as "the folders".
        problems: what was found wrong while listing.
        flip_reason: why images of this source must not be mirrored, or an empty string.
        limit_pixels: an image of more pixels is refused.
    """

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def paths(self) -> Sequence[str]: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def split(self) -> np.ndarray | None: ...
    @property
    def groups(self) -> np.ndarray | None: ...
    @property
    def weights(self) -> np.ndarray | None: ...
    @property
    def split_origin(self) -> str: ...
    @property
    def problems(self) -> tuple[Problem, ...]: ...
    @property
    def flip_reason(self) -> str: ...
    @property
    def limit_pixels(self) -> int: ...

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        """Return one image; raises `ImageError` when it is broken."""
        ...

    def encoded(self, index: int) -> bytes:
        """Return one image as an image file holds it: as it is stored, or as PNG where only pixels are."""
        ...

    def location(self, index: int) -> str:
        """Return where one image is, for people."""
        ...

    def identity(self, index: int) -> bytes | None:
        """Return what changes when the image does, without decoding it; None where its file is gone."""
        ...

    def strict(self) -> Dataset:
        """Return the same source, but one that gives no damaged image."""
        ...
