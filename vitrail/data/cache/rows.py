"""A cache on disk of one row of numbers for each image, so that only new images are computed."""

from __future__ import annotations

import contextlib
import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from vitrail.files import cache_folder
from vitrail.tensor_files import load_tensors, save_tensors

KEY = np.dtype("V16")
_MOST_FILES = 32  # more files than this are joined into one


class RowCache:
    """Rows of numbers under 16-byte keys, in a folder of files that are not changed once they are written.

    Each file is written whole and under a name of its own, so that several processes can add at once. A broken file
    counts as absent: its checksum must match before a row of it is used.
    """

    def __init__(self, folder: Path, width: int, dtype: type[np.generic]) -> None:
        self.folder, self.width, self.dtype = folder, width, np.dtype(dtype)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        with contextlib.suppress(FileNotFoundError):  # another process may be joining files
            return sum(path.stat().st_size for path in self._files())
        return 0

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows [N, width] and whether each was found [N]."""
        values = np.zeros((len(keys), self.width), dtype=self.dtype)
        found = np.zeros(len(keys), dtype=bool)
        positions = {key: position for position, key in enumerate(keys.tolist())}
        for path in self._files():
            content = self._read_file(path)
            if content is None:
                continue
            rows = np.asarray([positions.get(key, -1) for key in content[0].tolist()], dtype=np.int64)
            values[rows[rows >= 0]] = content[1][rows >= 0]
            found[rows[rows >= 0]] = True
        return values, found

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add rows, and join the files when there are many.

        Raises:
            OSError: the folder cannot be written.
        """
        if not len(keys):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(keys, values)
        paths = self._files()
        if len(paths) > _MOST_FILES:
            contents = [content for path in paths if (content := self._read_file(path)) is not None]
            if not contents:
                return  # another process has joined all of them meanwhile
            keys, values = (np.concatenate(arrays) for arrays in zip(*contents, strict=True))
            last = list({key: row for row, key in enumerate(keys.tolist())}.values())
            joined = self._write(keys[last], values[last])
            for path in set(paths) - {joined}:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all rows."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _write(self, keys: np.ndarray, values: np.ndarray) -> Path:
        """Write a file, named after its content, and return its path."""
        raw = keys.view(np.uint8).reshape(-1, KEY.itemsize)
        name = hashlib.blake2b(raw.tobytes() + values.tobytes(), digest_size=8).hexdigest()
        path = self.folder / f"{name}.safetensors"
        tensors = {"keys": torch.from_numpy(raw), "rows": torch.from_numpy(values)}
        save_tensors(path, tensors, {"crc32": str(_checksum(raw, values))})
        return path

    def _read_file(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the keys and rows of a file, or None when it is broken or gone."""
        try:
            tensors, metadata = load_tensors(path)
            keys, values = tensors["keys"].numpy(), tensors["rows"].numpy()
            has_shapes = keys.shape == (len(values), KEY.itemsize) and values.shape[1:] == (self.width,)
            if not has_shapes or keys.dtype != np.uint8 or values.dtype != self.dtype:
                return None
            if int(metadata["crc32"]) != _checksum(keys, values):
                return None
        except (ValueError, KeyError):
            return None
        return keys.view(KEY).reshape(-1), values


def _checksum(keys: np.ndarray, values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(np.ascontiguousarray(keys).data))


def rows_folder(
    kind: str, dataset_name: str, depends_on: Iterable[object], weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Return the folder for rows about a dataset's images, named after the dataset and a hash of their dependencies.

    Args:
        kind: name of the parent folder.
        dataset_name: name of the dataset.
        depends_on: values that the rows depend on, compared by their text.
        weights: tensors that the rows depend on.
    """
    digest = hashlib.blake2b(
        "\0".join(map(str, [dataset_name, *depends_on])).encode("utf-8", "surrogateescape"), digest_size=8
    )
    for name, values in sorted((weights or {}).items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", dataset_name)[-40:]
    return cache_folder() / kind / f"{name}-{digest.hexdigest()}"
