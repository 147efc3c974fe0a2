"""Download files to the cache folder, once: by several threads, and resuming where a connection was cut."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vitrail.data.datasets.webdataset.stores import FsspecStore, Refused, Remote, Store, store_of
from vitrail.data.progress import Advance
from vitrail.files import cache_folder
from vitrail.lookup import first_line, shorten

TRIES = 6  # in a row without progress
PAUSE_S = 0.5  # after the first failure; each further pause is twice as long
_THREADS = 8
_SPARE_BYTES = 256 << 20  # left free on the disk


class Missing(ValueError):
    """Raised when there is no file at an address."""


class Denied(ValueError):
    """Raised when a file must not be read; some stores answer so for files that do not exist."""


def list_addresses(pattern: str) -> list[str]:
    """Return the addresses that match a pattern with `*`, sorted.

    Raises:
        ValueError: none matches, or the store cannot list its files.
    """
    store = store_of(pattern)
    if not isinstance(store, FsspecStore):
        raise ValueError(
            f"{pattern}: web servers cannot be asked for a list; write a range such as train-{{000..123}}.tar"
        )
    paths = _retry(pattern, lambda: sorted(map(str, store.files.glob(store.files._strip_protocol(pattern)))))
    if not paths:
        raise ValueError(f"{pattern}: no file there has such a name")
    return [store.files.unstrip_protocol(path) for path in paths]


def inspect_addresses(urls: Sequence[str]) -> list[Remote]:
    """Return the size and version mark of the file at each address.

    Raises:
        ValueError: some are missing, or a store does not answer.
    """
    first_urls = {urlsplit(url)[:2]: url for url in reversed(urls)}
    stores = {key: store_of(url) for key, url in first_urls.items()}

    def inspect(url: str) -> Remote | None:
        try:
            return _retry(url, lambda: stores[urlsplit(url)[:2]].inspect(url))
        except Missing:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        remotes = list(pool.map(inspect, urls))
    missing = [url for url, remote in zip(urls, remotes, strict=True) if remote is None]
    if missing:
        count = f"{len(missing)} of {len(urls)} files are missing: " if len(urls) > 1 else "no such file: "
        raise ValueError(f"{count}{shorten(missing)}; fix the address, or restore the files")
    return [remote for remote in remotes if remote is not None]


def fetch_optional(url: str) -> Path | None:
    """Return the path of the copy of a file that may be missing; None where it is."""
    try:
        return fetch([_retry(url, lambda: store_of(url).inspect(url))])[0]
    except (Missing, Denied):
        return None


def fetch(remotes: Sequence[Remote], advance: Advance = lambda done, total: None) -> list[Path]:
    """Return the paths of the files' copies in the cache folder; missing copies are downloaded.

    Several processes share the copies: one downloads a file, the others wait for it. A download that was cut off or
    whose process has ended is resumed.

    Args:
        advance: called with the megabytes fetched and the total.

    Raises:
        ValueError: the disk is too small, or a file cannot be fetched.
    """
    missing = [remote for remote in remotes if not _is_whole(remote)]
    if not missing:
        return [remote.copy_path for remote in remotes]
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    check_space(missing, folder)
    total, done, lock = sum(remote.size for remote in missing), 0, threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            advance(done // 10**6, total // 10**6)

    stopped = threading.Event()
    stores = {urlsplit(remote.url)[:2]: store_of(remote.url) for remote in missing}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(fetch_one, each, stores[urlsplit(each.url)[:2]], count, stopped) for each in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopped.set()
            for future in futures:
                future.cancel()
            raise
    return [remote.copy_path for remote in remotes]


def check_space(missing: Sequence[Remote], folder: Path) -> None:
    """Raise a ValueError when the files to be downloaded do not fit on the disk."""
    drafts = sum(draft.stat().st_size for remote in missing if (draft := _draft(remote)).exists())
    needed, free = sum(remote.size for remote in missing) - drafts + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{len(missing):,} shards need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; make room, "
            "or set VITRAIL_CACHE to a folder on a larger disk"
        )


def fetch_one(remote: Remote, store: Store, count: Callable[[int], None], stopped: threading.Event) -> None:
    """Download a file unless another process has done so meanwhile."""
    from filelock import FileLock

    draft = _draft(remote)
    with FileLock(remote.copy_path.with_name(f".{remote.copy_path.name}.lock")):
        if _is_whole(remote):
            count(remote.size)
            return
        if not remote.mark:
            draft.unlink(missing_ok=True)  # it may be the beginning of another content
        with draft.open("ab") as handle:
            count(handle.tell())

            def fetch_rest() -> None:
                if stopped.is_set():
                    raise Refused("stopped")
                if handle.tell() > remote.size:
                    handle.truncate(0)
                for offset, block in store.blocks(remote, handle.tell()) if handle.tell() < remote.size else ():
                    if stopped.is_set():
                        raise Refused("stopped")
                    assert offset <= handle.tell()
                    if offset < handle.tell():
                        count(offset - handle.tell())
                        handle.truncate(offset)
                        handle.seek(offset)
                    handle.write(block)
                    count(len(block))
                    handle.flush()
                if handle.tell() != remote.size:
                    raise OSError(f"the connection ended after {handle.tell():,} of {remote.size:,} bytes")

            _retry(remote.url, fetch_rest, handle.tell)
            os.fsync(handle.fileno())
        os.replace(draft, remote.copy_path)


def _retry(url: str, action: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
    """Call `action` until it succeeds, with growing pauses; give up after `TRIES` calls without progress.

    Raises:
        Missing, Denied: there is no file at the address, or none that may be read.
        ValueError: it failed for good.
    """
    failures, best = 0, progress()
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise Missing(f"{url}: no such file") from None
        except PermissionError as error:
            raise Denied(f"{url}: must not be read: {first_line(error)}; give this machine the right to") from None
        except (Refused, NotImplementedError) as error:
            raise ValueError(f"{url}: cannot be read: {first_line(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason: Exception = error
        except Exception as error:
            # The packages behind fsspec raise errors of all kinds; for those about credentials, trying again does not help.
            if "Credentials" in type(error).__name__:
                raise ValueError(
                    f"{url}: {first_line(error)}; for a public bucket set FSSPEC_S3_ANON=true, else give credentials as "
                    "for any AWS program"
                ) from None
            reason = error
        failures = failures + 1 if progress() <= best else 1
        best = max(best, progress())
        if failures >= TRIES:
            there = f", with {best:,} bytes there" if best else ""
            raise ValueError(
                f"{url}: cannot be fetched: {first_line(reason)} ({failures} tries{there}). Check the address and the "
                "connection, and type the command again: it goes on from what is there"
            )
        time.sleep(PAUSE_S * 2 ** (failures - 1))


def _draft(remote: Remote) -> Path:
    """Return the path of an unfinished download."""
    return remote.copy_path.with_name(f".{remote.copy_path.name}.part")


def _is_whole(remote: Remote) -> bool:
    """Return whether the copy of a file is complete."""
    with contextlib.suppress(OSError):
        return remote.copy_path.stat().st_size == remote.size
    return False
