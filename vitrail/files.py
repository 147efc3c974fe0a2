"""Atomic writes: a file is either the old one or the new one, also after a crash or on a full disk; and the cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def _umask() -> int:
    """Return the process's mask of permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once, at import, before there are threads


def _draft_of(path: Path) -> Path:
    """Return a name beside `path` that no other write takes, of this process's threads or of another process."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is flushed to disk and takes the place of `path`.

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
    """Give a temporary folder beside `path`; on success it becomes `path`, which must not exist or be empty.

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
    """Return a folder, made by `fill` in a temporary one unless it exists; several processes wait for the one that does.

    A folder that was not filled to the end is not there, whatever ended the process.
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
    """Return the folder of what can be computed again: `VITRAIL_CACHE`, else `vitrail` in the user's cache folder."""
    own = os.environ.get("VITRAIL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail"
