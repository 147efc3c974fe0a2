"""Write files and folders atomically: after a crash or on a full disk there is the old one or the new one. And the cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def _umask() -> int:
    """Return the process's permission mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once, at import, before there are threads


def _draft_of(path: Path) -> Path:
    """Return a temporary path beside `path` that no other thread or process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success the file is flushed to disk and replaces `path`.

    On any error the temporary file is removed and `path` stays as it was.
    """
    draft = _draft_of(path)
    try:
        yield draft
        with draft.open("rb+") as handle:
            os.fsync(handle.fileno())
        draft.chmod(0o666 & ~_UMASK)  # safetensors writes files that only their owner can read
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, which must not exist or be empty.

    On any error the temporary folder is removed, and nothing is left.
    """
    draft = _draft_of(path)
    draft.mkdir()
    try:
        yield draft
        for file in draft.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # an empty one
        os.rename(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def filled_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder, filled by `fill` unless it exists; other processes wait for the one that fills it.

    It is filled under a temporary name, so that it never exists half filled, whatever ends the process.
    """
    from filelock import FileLock

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            draft = path.with_name(f".{path.name}.part")
            if not path.exists():
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                try:
                    fill(draft)
                    os.rename(draft, path)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, content.encode("utf-8"))


def cache_folder() -> Path:
    """Return the folder for what can be computed again: `VITRAIL_CACHE`, else `vitrail` in the user's cache folder."""
    folder = os.environ.get("VITRAIL_CACHE")
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail"
