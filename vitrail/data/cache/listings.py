"""A listing kept in the cache folder, so that the next command need not make it again: arrays, and texts as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import cache_folder, replacing

_FORM = 5  # of these files and of what is kept in them: another number makes all be made anew


def read_listing(kind: str, identity: bytes) -> tuple[dict[str, np.ndarray], Any] | None:
    """Return what is kept of a file, None where nothing is, or where it is broken."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        with _place(kind, identity).open("rb") as file:
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
    """Keep a listing; where the cache folder cannot be written, nothing is kept, and the next command makes it again.

    Args:
        kind: what is listed, a folder's name.
        identity: what changes when the file does, as `file_identity` gives it.
    """
    from safetensors.numpy import save

    body = save({**arrays, "texts": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)})
    place = _place(kind, identity)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as draft, draft.open("wb") as file:
            file.write(zlib.crc32(body).to_bytes(4, "little"))
            file.write(body)


def _place(kind: str, identity: bytes) -> Path:
    digest = hashlib.blake2b(b"%d\0%b" % (_FORM, identity), digest_size=16).hexdigest()
    return cache_folder() / "listings" / kind / f"{digest}.bin"
