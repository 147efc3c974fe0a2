"""Any source as WebDataset shards: `train-000000.tar` and so on, with each image's bytes as they are.

Equal images, labels and seed give equal bytes. A sample is `00000012.jpg`, `.cls` with the number of its class in
`classes.json`, and `.json` with label, path in the source, part, group and weight.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from vitrail.config import DataConfig
from vitrail.data.datasets.base import SPLITS, Dataset, broken_image
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.webdataset.shards import CLASSES
from vitrail.data.datasets.webdataset.tar import BLOCK, END
from vitrail.data.images.decode import ENDINGS_OF, ImageError, read_described
from vitrail.data.problems import Problem, stop_on_errors
from vitrail.data.progress import Bar, no_bar
from vitrail.files import new_folder, write_text
from vitrail.threads import ordered_map

WITHOUT_SPLITS = "pictures"
_RECORD = 20 * BLOCK  # tar programs write whole records


@dataclass(frozen=True)
class WrittenShards:
    """What was written.

    Attributes:
        names: of the shards.
        counts: part → number of images.
    """

    names: tuple[str, ...]
    counts: dict[str, int]
    num_bytes: int
    num_left_out: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Encoded:
    content: bytes
    ending: str
    error: ImageError | OSError | None


def write_shards(
    config: DataConfig, out: Path, *, size: int, limit_bytes: int | None = None, seed: int = 0, bar: Bar = no_bar
) -> WrittenShards:
    """Write the images of a source into shards, in an order shuffled by `seed`; each is decoded once, to know it whole.

    Args:
        out: the folder to make; it is there when all is written, and not at all before.
        size: images in a shard, at most.
        limit_bytes: a shard is no larger, unless one sample is.

    Raises:
        ValueError: the folder holds something, or an image is broken and that was to stop the writing.
    """
    check_free(out)
    for name, value in (("--size", size), ("--bytes", limit_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    dataset = open_dataset(
        config.source, limit_pixels=config.limit_pixels, keep_damaged=config.damaged == "keep", bar=bar
    )
    stop_on_errors(dataset.problems)
    check_names(dataset)
    order = shuffled_splits(dataset, seed)
    problems, total = list(dataset.problems), sum(map(len, order.values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    names, counts, left_out, written = [], {}, 0, 0
    try:
        with new_folder(out) as draft, bar(f"writing {total:,} images") as advance:
            for part, indices in order.items():
                with _Shards(draft, part, size=size, limit_bytes=limit_bytes) as shards:
                    for index, found in encoded_images(dataset, indices, config):
                        if found.error is not None:
                            problems.append(broken_image(dataset, index, found.error, config.damaged))
                        if found.content and not any(each.severity == "error" for each in problems):
                            shards.add(sample_files(dataset, index, found, shards.num_samples))
                        left_out += not found.content
                        if (done := sum(counts.values()) + left_out + shards.num_samples) % 64 == 0:
                            advance(done, total)
                names += shards.names
                written += shards.num_bytes
                if shards.num_samples:
                    counts[part] = shards.num_samples
            stop_on_errors(problems)
            if not counts:
                raise ValueError(f"{dataset.name}: none of {total:,} images is whole; nothing is written")
            about = {"classes": list(dataset.labels), "flip_reason": dataset.flip_reason}
            write_text(draft / CLASSES, json.dumps(about) + "\n")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{out}: the disk is full; nothing is left of what was written") from None
    return WrittenShards(tuple(names), counts, written, left_out, tuple(problems))


def check_free(out: Path) -> None:
    """Raise a ValueError unless a folder can be made here, or is empty."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; choose another OUT")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; choose another OUT")


def check_names(dataset: Dataset) -> None:
    """Raise a ValueError when a class's name cannot be written as text, or not be read back."""
    for label in dataset.labels:
        if label != label.strip() or not label:
            raise ValueError(f"{dataset.name}: class {label!r} begins or ends with a blank; rename it")
        try:
            label.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{dataset.name}: class {label!r} is no Unicode text; rename it") from None


def shuffled_splits(dataset: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Return the images of each part in a shuffled order; in shards of one class, no batch would be mixed."""
    everything = np.arange(len(dataset.paths))
    parts = {WITHOUT_SPLITS: everything}
    if dataset.split is not None:
        parts = {part: found for part in SPLITS if len(found := everything[dataset.split == part])}
    return {
        part: np.random.Generator(np.random.Philox(key=[seed, number])).permutation(indices)
        for number, (part, indices) in enumerate(parts.items())
    }


def encoded_images(dataset: Dataset, indices: np.ndarray, config: DataConfig) -> Iterator[tuple[int, _Encoded]]:
    """Yield each image's number and its bytes, none where it is broken and not to be kept."""

    def one(index: int) -> _Encoded:
        try:
            content = dataset.encoded(index)
            image, info = read_described(content, limit_pixels=config.limit_pixels)
        except OSError as error:
            return _Encoded(b"", "", error)
        error = None
        if info.verdict != "ok":
            error = ImageError(dataclasses.replace(info, path=dataset.location(index)))
        kept = image is not None and (error is None or config.damaged == "keep")
        return _Encoded(content if kept else b"", ENDINGS_OF.get(info.format, ("",))[0], error)

    numbers = indices.tolist()
    yield from zip(numbers, ordered_map(one, numbers, config.workers), strict=True)


def sample_files(dataset: Dataset, index: int, found: _Encoded, number: int) -> dict[str, bytes]:
    """Return the files of one sample, by name."""
    target = int(dataset.targets[index])
    about: dict[str, str | float] = {"label": dataset.labels[target], "path": dataset.paths[index]}
    if dataset.split is not None:
        about["split"] = str(dataset.split[index])
    if dataset.groups is not None and dataset.groups[index] >= 0:
        about["group"] = str(dataset.groups[index])
    if dataset.weights is not None:
        about["weight"] = float(dataset.weights[index])
    key = f"{number:08d}"
    return {
        f"{key}.{found.ending}": found.content,
        f"{key}.cls": str(target).encode(),
        f"{key}.json": json.dumps(about).encode(),
    }


class _Shards:
    """The shards of one part, written one after the other."""

    def __init__(self, folder: Path, split: str, *, size: int, limit_bytes: int | None) -> None:
        self.folder, self.split, self.size, self.limit_bytes = folder, split, size, limit_bytes
        self.names: list[str] = []
        self.num_samples = self.num_bytes = 0
        self._file: BinaryIO | None = None
        self._here = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def add(self, files: dict[str, bytes]) -> None:
        """Write a sample; its files follow each other."""
        length = sum(BLOCK + len(content) + -len(content) % BLOCK for content in files.values())
        if self._file is not None and (
            self._here == self.size
            or (self.limit_bytes is not None and padded(self._file.tell() + length) > self.limit_bytes)
        ):
            self.close()
        if self._file is None:
            self.names.append(f"{self.split}-{len(self.names):06d}.tar")
            self._file, self._here = (self.folder / self.names[-1]).open("wb"), 0
        for name, content in files.items():
            info = tarfile.TarInfo(name)  # no owner, and 1970 as its time: equal images give equal bytes
            info.size, info.mode = len(content), 0o644
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            self._file.write(content)
            self._file.write(bytes(-len(content) % BLOCK))
        self._here += 1
        self.num_samples += 1

    def close(self) -> None:
        """End the shard that is being written."""
        if self._file is not None:
            end = self._file.tell()
            self._file.write(bytes(padded(end) - end))
            self.num_bytes += self._file.tell()
            self._file.close()
            self._file = None


def padded(length: int) -> int:
    """Return how long a tar of so many bytes is with its end mark."""
    return -(-(length + 2 * len(END)) // _RECORD) * _RECORD
