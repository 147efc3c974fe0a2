"""Write any dataset as WebDataset shards: `train-000000.tar` and so on, with the bytes of each image as they are.

Equal images, labels and seed give equal bytes. A sample is `00000012.jpg`, `.cls` with the index of its class in
`classes.json`, and `.json` with label, path in the dataset, split, group and weight.
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

WITHOUT_SPLITS = "pictures"  # begins the names of shards of a dataset without splits
_RECORD = 20 * BLOCK  # bytes; tar programs write whole records


@dataclass(frozen=True)
class WrittenShards:
    """The names and sizes of the shards that were written.

    Attributes:
        names: of the shards.
        counts: split → number of images.
    """

    names: tuple[str, ...]
    counts: dict[str, int]
    num_bytes: int
    num_left_out: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Encoded:
    """The bytes of an image, none where it is broken and left out, its file name ending, and its error."""

    content: bytes
    ending: str
    error: ImageError | OSError | None


def write_shards(
    config: DataConfig, out: Path, *, size: int, limit_bytes: int | None = None, seed: int = 0, bar: Bar = no_bar
) -> WrittenShards:
    """Write the images of a dataset to shards, in an order shuffled by `seed`; each is decoded once, to check it.

    Args:
        out: the folder to make; it appears when everything is written.
        size: most images in a shard.
        limit_bytes: most bytes of a shard, unless a single sample is larger.

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
            for split, indices in order.items():
                with _ShardWriter(draft, split, size=size, limit_bytes=limit_bytes) as shards:
                    for index, encoded in encoded_images(dataset, indices, config):
                        if encoded.error is not None:
                            problems.append(broken_image(dataset, index, encoded.error, config.damaged))
                        if encoded.content and not any(problem.severity == "error" for problem in problems):
                            shards.add(sample_files(dataset, index, encoded, shards.num_samples))
                        left_out += not encoded.content
                        if (done := sum(counts.values()) + left_out + shards.num_samples) % 64 == 0:
                            advance(done, total)
                names += shards.names
                written += shards.num_bytes
                if shards.num_samples:
                    counts[split] = shards.num_samples
            stop_on_errors(problems)
            if not counts:
                raise ValueError(f"{dataset.name}: none of {total:,} images is whole; nothing is written")
            content = {"classes": list(dataset.labels), "flip_reason": dataset.flip_reason}
            write_text(draft / CLASSES, json.dumps(content) + "\n")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{out}: the disk is full; nothing is left of what was written") from None
    return WrittenShards(tuple(names), counts, written, left_out, tuple(problems))


def check_free(out: Path) -> None:
    """Raise a ValueError unless `out` is an empty folder or does not exist."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; choose another OUT")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; choose another OUT")


def check_names(dataset: Dataset) -> None:
    """Raise a ValueError when the name of a class cannot be written as text, or would be read back differently."""
    for label in dataset.labels:
        if label != label.strip() or not label:
            raise ValueError(f"{dataset.name}: class {label!r} begins or ends with a blank; rename it")
        try:
            label.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{dataset.name}: class {label!r} is no Unicode text; rename it") from None


def shuffled_splits(dataset: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Return the indices of each split in a shuffled order; in the listed order, a shard would hold one class."""
    everything = np.arange(len(dataset.paths))
    splits = {WITHOUT_SPLITS: everything}
    if dataset.split is not None:
        splits = {split: found for split in SPLITS if len(found := everything[dataset.split == split])}
    return {
        split: np.random.Generator(np.random.Philox(key=[seed, number])).permutation(indices)
        for number, (split, indices) in enumerate(splits.items())
    }


def encoded_images(dataset: Dataset, indices: np.ndarray, config: DataConfig) -> Iterator[tuple[int, _Encoded]]:
    """Yield the index and the bytes of each image; no bytes where it is broken and left out."""

    def encode(index: int) -> _Encoded:
        try:
            content = dataset.encoded(index)
            image, info = read_described(content, limit_pixels=config.limit_pixels)
        except OSError as error:
            return _Encoded(b"", "", error)
        error = None
        if info.verdict != "ok":
            error = ImageError(dataclasses.replace(info, path=dataset.location(index)))
        is_written = image is not None and (error is None or config.damaged == "keep")
        return _Encoded(content if is_written else b"", ENDINGS_OF.get(info.format, ("",))[0], error)

    order = indices.tolist()
    yield from zip(order, ordered_map(encode, order, config.workers), strict=True)


def sample_files(dataset: Dataset, index: int, encoded: _Encoded, number: int) -> dict[str, bytes]:
    """Return the files of one sample, by name; `number` counts the samples of its split."""
    target = int(dataset.targets[index])
    metadata: dict[str, str | float] = {"label": dataset.labels[target], "path": dataset.paths[index]}
    if dataset.split is not None:
        metadata["split"] = str(dataset.split[index])
    if dataset.groups is not None and dataset.groups[index] >= 0:
        metadata["group"] = str(dataset.groups[index])
    if dataset.weights is not None:
        metadata["weight"] = float(dataset.weights[index])
    key = f"{number:08d}"
    return {
        f"{key}.{encoded.ending}": encoded.content,
        f"{key}.cls": str(target).encode(),
        f"{key}.json": json.dumps(metadata).encode(),
    }


class _ShardWriter:
    """Writes the shards of one split, one after the other."""

    def __init__(self, folder: Path, split: str, *, size: int, limit_bytes: int | None) -> None:
        self.folder, self.split, self.size, self.limit_bytes = folder, split, size, limit_bytes
        self.names: list[str] = []
        self.num_samples = self.num_bytes = 0
        self._file: BinaryIO | None = None
        self._num_in_shard = 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def add(self, files: dict[str, bytes]) -> None:
        """Write the files of a sample one after the other, in a new shard where this one is full."""
        length = sum(BLOCK + len(content) + -len(content) % BLOCK for content in files.values())
        if self._file is not None and (
            self._num_in_shard == self.size
            or (self.limit_bytes is not None and padded(self._file.tell() + length) > self.limit_bytes)
        ):
            self.close()
        if self._file is None:
            self.names.append(f"{self.split}-{len(self.names):06d}.tar")
            self._file, self._num_in_shard = (self.folder / self.names[-1]).open("wb"), 0
        for name, content in files.items():
            info = tarfile.TarInfo(name)  # no owner, and 1970 as its time: equal images give equal bytes
            info.size, info.mode = len(content), 0o644
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            self._file.write(content)
            self._file.write(bytes(-len(content) % BLOCK))
        self._num_in_shard += 1
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
    """Return the size of a tar of `length` bytes with its end mark."""
    return -(-(length + 2 * len(END)) // _RECORD) * _RECORD
