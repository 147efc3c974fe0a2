"""A cache of dataset listings, so that the next command need not list again: arrays, and texts as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import cache_folder, replacing

_FORMAT = 5  # of these files and their content; raise it to ignore files of the older format


def read_listing(kind: str, identity: bytes) -> tuple[dict[str, np.ndarray], Any] | None:
    """Return the cached listing of a file; None where there is none, or where it is broken."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        with _listing_path(kind, identity).open("rb") as file:
            checksum, body = file.read(4), file.read()
    except OSError:
        return None
    if zlib.crc32(body).to_bytes(4, "little") != checksum:
        return None
    try:
        arrays = load(body)
        return arrays, json.loads(arrays.pop("texts").tobytes())
    except (SafetensorError, KeyError, ValueError):
        return None


def write_listing(kind: str, identity: bytes, arrays: dict[str, np.ndarray], texts: Any) -> None:
    """Store a listing; where the cache folder cannot be written, nothing is stored, and the next command lists again.

    Args:
        kind: name of the folder for listings of this kind.
        identity: bytes that change when the listed file does, as `file_identity` returns them.
    """
    from safetensors.numpy import save

    body = save({**arrays, "texts": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)})
    path = _listing_path(kind, identity)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, draft.open("wb") as file:
            file.write(zlib.crc32(body).to_bytes(4, "little"))
            file.write(body)


def _listing_path(kind: str, identity: bytes) -> Path:
    digest = hashlib.blake2b(b"%d\0%b" % (_FORMAT, identity), digest_size=16).hexdigest()
    return cache_folder() / "listings" / kind / f"{digest}.bin"
