"""What was found out about an image, kept on disk: after ten more images, ten are worked on."""

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
_PIECES = 32  # more files than this are joined into one


class RowCache:
    """Rows of numbers under 16-byte keys, in a folder of files that are never changed once they are written.

    Each file is written whole and under a name of its own, so that several processes can add at once. A file that is
    broken counts as absent: its checksum must hold before a row of it is used.
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
        place = {key: number for number, key in enumerate(keys.tolist())}
        for path in self._files():
            piece = self._piece(path)
            if piece is None:
                continue
            here = np.asarray([place.get(key, -1) for key in piece[0].tolist()], dtype=np.int64)
            values[here[here >= 0]] = piece[1][here >= 0]
            found[here[here >= 0]] = True
        return values, found

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Keep rows, and join the files when they have become many.

        Raises:
            OSError: the folder cannot be written.
        """
        if not len(keys):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(keys, values)
        paths = self._files()
        if len(paths) > _PIECES:
            whole = [piece for path in paths if (piece := self._piece(path)) is not None]
            keys, values = np.concatenate([piece[0] for piece in whole]), np.concatenate([piece[1] for piece in whole])
            last = list({key: number for number, key in enumerate(keys.tolist())}.values())
            joined = self._write(keys[last], values[last])
            for path in set(paths) - {joined}:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
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

    def _piece(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the keys and rows of a file, or None when it is broken or gone."""
        try:
            tensors, metadata = load_tensors(path)
            keys, values = tensors["keys"].numpy(), tensors["rows"].numpy()
            shapes = keys.shape == (len(values), KEY.itemsize) and values.shape[1:] == (self.width,)
            if not shapes or keys.dtype != np.uint8 or values.dtype != self.dtype:
                return None
            if int(metadata["crc32"]) != _checksum(keys, values):
                return None
        except (ValueError, KeyError):
            return None
        return keys.view(KEY).reshape(-1), values


def _checksum(keys: np.ndarray, values: np.ndarray) -> int:
    return zlib.crc32(values.tobytes(), zlib.crc32(keys.tobytes()))


def rows_folder(
    kind: str, source: str, what: Iterable[object], weights: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Return the folder for rows about a source's images: its name tells the source, and a hash all that the rows depend on.

    Args:
        kind: the folder above it.
        source: the name of the dataset.
        what: values of which each, by its text, makes other rows.
        weights: tensors that do so too.
    """
    digest = hashlib.blake2b("\0".join(map(str, [source, *what])).encode("utf-8", "surrogateescape"), digest_size=8)
    for name, values in sorted((weights or {}).items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source)[-40:]
    return cache_folder() / kind / f"{name}-{digest.hexdigest()}"
