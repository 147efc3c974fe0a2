"""The `Dataset` protocol, and its forms by where the images are: single files, arrays, Parquet files, tar shards."""

from __future__ import annotations

import abc
import hashlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from vitrail.data.images.decode import ImageError, read_image
from vitrail.data.problems import Problem

SPLIT_BY_FOLDERS = "the folders"  # the split origin of a dataset with the folders train/ val/ test/

SPLITS = ("train", "val", "test")
# Matched in any case of letters: Train/ and Test/ must not silently be read as two classes.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """The listing that all datasets have in common, before an image is read; `Dataset` describes the fields."""

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
    """Images in single files: class folders, tables, and downloaded datasets that are unpacked to files.

    Attributes:
        root: folder that `paths` are relative to; an absolute path stays as it is.
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


@dataclass(frozen=True, kw_only=True)
class ArrayDataset(ImageDataset):
    """Images in memory: arrays of uint8 [N, H, W] grey or [N, H, W, 3] colour, one array after the other."""

    arrays: tuple[np.ndarray, ...]

    def pixels(self, index: int) -> np.ndarray:
        """Return a view of one image's pixels."""
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


@dataclass(frozen=True, kw_only=True)
class EncodedDataset(ImageDataset, abc.ABC):
    """Images of which many are stored in one file."""

    damaged: Literal["refuse", "keep"]

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """Return the bytes of one image as they are stored."""

    @abc.abstractmethod
    def location(self, index: int) -> str:
        """Return the location of one image, for people."""

    def read(self, index: int, mode: Literal["RGB", "L"]) -> PIL.Image.Image:
        return read_image(
            self.encoded(index),
            mode=mode,
            limit_pixels=self.limit_pixels,
            damaged=self.damaged,
            name=self.location(index),
        )


@dataclass(frozen=True, kw_only=True)
class ParquetDataset(EncodedDataset):
    """Encoded images from Parquet files, copied to one file in the cache folder that is mapped into memory.

    Attributes:
        content: the bytes of that file.
        starts: [N + 1] the offset of each image, and the end of the last.
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
    """A tar shard whose bytes are on this machine.

    Attributes:
        location: its path or address, as the user gave it.
        stem: how the paths of its images begin.
        file: path of the shard itself, or of its copy in the cache folder.
        state: length in bytes and time of the last write (ns), when it was listed.
        identity: bytes that change when its content does.
    """

    location: str
    stem: str
    file: str
    state: tuple[int, int]
    identity: bytes


@dataclass(frozen=True, kw_only=True)
class TarDataset(EncodedDataset):
    """Images in tar shards, each read at its offset.

    A tar is opened for each image: held open, or mapped, a thousand of them would use up the file handles of a process,
    and a mapped file that is cut off kills the process instead of raising an error.

    Attributes:
        shards: in the order of their images.
        firsts: [S] index of each shard's first image.
        starts, sizes: [N] offset and length of each image in its shard, bytes.
    """

    shards: tuple[TarShard, ...]
    firsts: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def shard(self, index: int) -> int:
        """Return the index of the shard that holds an image."""
        return int(np.searchsorted(self.firsts, index, side="right")) - 1

    def encoded(self, index: int) -> bytes:
        shard, size = self.shards[self.shard(index)], int(self.sizes[index])
        with open(shard.file, "rb", buffering=0) as handle:
            status = os.fstat(handle.fileno())
            if (status.st_size, status.st_mtime_ns) != shard.state:
                raise ValueError(f"{shard.location}: was changed after it was listed; start again")
            handle.seek(int(self.starts[index]))
            content = handle.read(size)
            while 0 < len(content) < size and (more := handle.read(size - len(content))):
                content += more
            return content

    def location(self, index: int) -> str:
        shard = self.shards[self.shard(index)]
        return f"{shard.location}: {self.paths[index].removeprefix(shard.stem + '/')}"

    def identity(self, index: int) -> bytes | None:
        return b"%b\0%d %d" % (self.shards[self.shard(index)].identity, self.starts[index], self.sizes[index])


def file_identity(path: str) -> bytes | None:
    """Return path, size, times of writing and change, and inode of a file; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    # Copying can set back the time of writing, but not the time of change or the inode.
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return f"{path}\0{state}".encode("utf-8", "surrogateescape")


def flip_reason(labels: Sequence[str]) -> str:
    """Return why images of classes with these names must not be mirrored; empty when they may be."""
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
    """Return the problem of a broken image: an error, unless the user chose to go on without it."""
    severity = "error" if damaged == "stop" else "warning"
    verdict = error.info.verdict if isinstance(error, ImageError) else "unreadable"
    assert verdict != "ok"
    remedy = "Fix or remove it, or go on without such files by --data.damaged drop"
    consequences = {
        "stop": remedy,
        "drop": "It is left out",
        "keep": "What can be decoded is kept; else it is left out",
    }
    message = f"{error}. {consequences[damaged]}"
    return Problem(severity, verdict, (dataset.paths[index],), message)


@runtime_checkable
class Dataset(Protocol):
    """Labelled images, listed but not yet read.

    Attributes:
        name: a short name for messages and file names.
        labels: class names in class order.
        paths: one identifying path per image, relative to the dataset, with `/` between folders.
        targets: [N] class index of every image.
        split: [N] split (train, val, test) of every image where the dataset has splits of its own, or None.
        groups: [N] group number of every image, -1 for none; or None. Images of one group (one patient, one video) are
            always in the same split.
        weights: [N] weight of each image in the training's loss, above 0; or None.
        split_origin: what defines the dataset's own splits, for people, such as "the folders".
        problems: those found in listing.
        flip_reason: why images of this dataset must not be mirrored, or an empty string.
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
        """Return one image as the bytes of an image file: as it is stored, or as PNG where only pixels are."""
        ...

    def location(self, index: int) -> str:
        """Return the location of one image, for people."""
        ...

    def identity(self, index: int) -> bytes | None:
        """Return bytes that change when the image does, without decoding it; None where its file is gone."""
        ...
