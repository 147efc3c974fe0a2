"""Frozen features of pictures, kept on disk for each picture: after ten more pictures, ten are computed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import vitrail
from vitrail.data.decode import PictureError
from vitrail.data.loader import Pictures
from vitrail.data.scan import ordered_map
from vitrail.data.sources import Digits, Source
from vitrail.evaluation.classifier import Classifier
from vitrail.evaluation.judge import BATCH, judge
from vitrail.files import cache_folder
from vitrail.settings import to_dict
from vitrail.weights.store import load_tensors, save_tensors

FORMAT = 1  # raise it when a model computes something else from the same weights
_KEY = np.dtype("V16")
_SLICE = 4 * BATCH  # pictures between two looks at the clock
_SAVE_S = 60.0  # an interruption loses at most about this much work
_PIECES = 32  # more files than this are joined into one


@dataclass(frozen=True)
class Features:
    """Pooled vectors of pictures.

    Attributes:
        values: [N, D] float32.
        indices: [N] which pictures of the source these are, in the order they were asked for.
        from_cache: how many of them were read and not computed.
        problem: why the cache could not be written, or an empty string.
    """

    values: np.ndarray
    indices: np.ndarray
    from_cache: int
    problem: str = ""


class FeatureCache:
    """Rows of features under 16-byte keys, in a folder of files that are never changed once they are written.

    Each file is written whole and under a name of its own, so that several processes can add at once. A file that is
    broken counts as absent: its checksum must hold before a row of it is used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self._files())

    def read(self, keys: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows [N, width] float32 and whether each was found [N]."""
        values = np.zeros((len(keys), width), dtype=np.float32)
        found = np.zeros(len(keys), dtype=bool)
        place = {key: number for number, key in enumerate(keys.tolist())}
        for path in self._files():
            piece = _read_piece(path, width)
            if piece is None:
                continue
            here = np.asarray([place.get(key, -1) for key in piece[0].tolist()], dtype=np.int64)
            values[here[here >= 0]] = piece[1][here >= 0]
            found[here[here >= 0]] = True
        return values, found

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Keep rows.

        Raises:
            OSError: the folder cannot be written.
        """
        if not len(keys):
            return
        raw = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, _KEY.itemsize)
        name = hashlib.blake2b(raw.tobytes() + values.tobytes(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"keys": torch.from_numpy(raw), "features": torch.from_numpy(values)}
        save_tensors(self.folder / f"{name}.safetensors", tensors, {"crc32": str(_checksum(raw, values))})
        paths = self._files()
        if len(paths) > _PIECES:
            whole = [piece for path in paths if (piece := _read_piece(path, values.shape[1])) is not None]
            keys = np.concatenate([piece[0] for piece in whole])
            last = list({key: number for number, key in enumerate(keys.tolist())}.values())
            self.add(keys[last], np.concatenate([piece[1] for piece in whole])[last])
            for path in paths:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def open_cache(classifier: Classifier, source: Source, device: torch.device) -> FeatureCache:
    """Return the cache of what a model makes of a source's pictures.

    The folder's name holds the source's name and a hash of the weights without the head, the architecture, the preprocessing,
    the kind of device and Vitrail's version.
    """
    model = classifier.model
    what = {
        "format": [FORMAT, vitrail.__version__, device.type],
        "architecture": to_dict(dataclasses.replace(model.config, num_classes=0)),
        "patch_size": classifier.patch_size,
        "preprocess": to_dict(classifier.preprocess),
        "source": source.name,
    }
    digest = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8)
    for name, values in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[-40:]
    return FeatureCache(cache_folder() / "features" / f"{name}-{digest.hexdigest()}")


def picture_keys(source: Source, indices: np.ndarray, classifier: Classifier, workers: int = 0) -> np.ndarray:
    """Return what each picture is known by [N] V16: path, size and instant of change of its file, else its pixels."""

    def key(index: int) -> bytes:
        place = os.path.abspath(source.location(index))
        known = None if isinstance(source, Digits) else _file_state(place)
        if known is None:
            place, known = "", _content(source, index, classifier.preprocess.mode)
        text = f"{source.paths[index]}\0{place}\0".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text + known, digest_size=_KEY.itemsize).digest()

    return np.frombuffer(b"".join(ordered_map(key, map(int, indices), workers)), dtype=_KEY)


def features_of(
    classifier: Classifier,
    pictures: Pictures,
    indices: np.ndarray,
    *,
    device: torch.device,
    cache: FeatureCache,
    fresh: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Return the pooled vectors of pictures, from the cache where it has them, else computed in fp32 and put there.

    A file that can no longer be read is left out and noted in `pictures.dropped`.

    Args:
        classifier: its model has no head, so that it returns the pooled vector.
        fresh: forget what the cache has.

    Raises:
        ValueError: a feature is not finite.
    """
    width = classifier.model.decoder.out_dim
    # Before a file is read: one that changes meanwhile is then known by what it was, and computed again.
    keys = picture_keys(pictures.source, indices, classifier, pictures.workers)
    if fresh:
        cache.clear()
    values, found = cache.read(keys, width)
    from_cache, problem = int(found.sum()), ""
    missing, waiting, saved_at = np.flatnonzero(~found), [], time.monotonic()

    def save() -> str:
        rows = np.concatenate(waiting) if waiting else np.zeros(0, dtype=np.int64)
        waiting.clear()
        try:
            cache.add(keys[rows], values[rows])
        except OSError as error:
            return f"{cache.folder}: {error.strerror or error}"
        return ""

    try:
        for start in range(0, len(missing), _SLICE):
            rows = missing[start : start + _SLICE]
            out = judge(
                classifier.model,
                pictures,
                indices[rows],
                device=device,
                patch_size=classifier.patch_size,
                advance=lambda done, _, start=start: advance(start + done, len(missing)),
            )
            check_finite(out.logits, out.indices, pictures.source)
            # They come back in the order of the source, without those that could not be read.
            rows = rows[np.argsort(indices[rows])]
            rows = rows[np.isin(indices[rows], out.indices)]
            values[rows], found[rows] = out.logits, True
            waiting.append(rows)
            if time.monotonic() - saved_at > _SAVE_S:
                problem, saved_at = problem or save(), time.monotonic()
    finally:
        problem = problem or save()
    return Features(values[found], indices[found], from_cache, problem)


def check_finite(values: np.ndarray, indices: np.ndarray, source: Source) -> None:
    """Raise a ValueError when a feature is not finite."""
    broken = indices[~np.isfinite(values).all(axis=1)]
    if len(broken):
        raise ValueError(
            f"the model's features are not finite, first for {source.location(int(broken[0]))}; its weights are broken, "
            "take another model"
        )


def _content(source: Source, index: int, mode: Literal["RGB", "L"]) -> bytes:
    """Return what a picture without a file of its own is known by: its pixels, or nothing known when it is broken."""
    try:
        pixels = np.asarray(source.read(index, mode))
    except (PictureError, OSError):
        return os.urandom(_KEY.itemsize)
    return f"{pixels.shape}".encode() + pixels.tobytes()


def _file_state(place: str) -> bytes | None:
    """Return size and instant of change of a file, or None where there is none."""
    try:
        found = os.stat(place)
    except OSError:
        return None
    return f"{found.st_size} {found.st_mtime_ns}".encode() if stat.S_ISREG(found.st_mode) else None


def _checksum(keys: np.ndarray, values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(np.ascontiguousarray(keys).data))


def _read_piece(path: Path, width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the keys and rows of a file, or None when it is broken or gone."""
    try:
        tensors, metadata = load_tensors(path)
        keys, values = tensors["keys"].numpy(), tensors["features"].numpy()
        right = keys.dtype == np.uint8 and keys.shape == (len(values), _KEY.itemsize) and values.dtype == np.float32
        if not right or values.shape[1:] != (width,) or int(metadata["crc32"]) != _checksum(keys, values):
            return None
        return np.ascontiguousarray(keys).view(_KEY).reshape(-1), values
    except (ValueError, KeyError):
        return None
