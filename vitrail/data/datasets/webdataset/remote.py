"""Files at an address, fetched once to the cache folder: whole, by several threads, and going on after a cut."""

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

TRIES = 6  # in a row that bring nothing new
PAUSE_S = 0.5  # after the first failure; each further one waits twice as long
_THREADS = 8
_SPARE_BYTES = 256 << 20  # left free on the disk


class Missing(ValueError):
    """There is no file at an address."""


class Denied(ValueError):
    """A file must not be read; some stores answer so to what is not there."""


def list_addresses(pattern: str) -> list[str]:
    """Return the addresses that a pattern with `*` stands for, sorted.

    Raises:
        ValueError: none does, or the store cannot list.
    """
    store = store_of(pattern)
    if not isinstance(store, FsspecStore):
        raise ValueError(
            f"{pattern}: web servers cannot be asked for a list; write a range such as train-{{000..123}}.tar"
        )
    found = _persist(pattern, lambda: sorted(map(str, store.files.glob(store.files._strip_protocol(pattern)))))
    if not found:
        raise ValueError(f"{pattern}: no file there has such a name")
    return [store.files.unstrip_protocol(each) for each in found]


def inspect_addresses(urls: Sequence[str]) -> list[Remote]:
    """Return what is at each address.

    Raises:
        ValueError: some are missing, or a store does not answer.
    """
    stores = {urlsplit(url)[:2]: url for url in reversed(urls)}
    opened = {key: store_of(url) for key, url in stores.items()}

    def one(url: str) -> Remote | None:
        try:
            return _persist(url, lambda: opened[urlsplit(url)[:2]].look_up(url))
        except Missing:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(one, urls))
    gone = [url for url, remote in zip(urls, found, strict=True) if remote is None]
    if gone:
        count = f"{len(gone)} of {len(urls)} files are missing: " if len(urls) > 1 else "no such file: "
        raise ValueError(f"{count}{shorten(gone)}; mend the address, or restore the files")
    return [remote for remote in found if remote is not None]


def optional(url: str) -> Path | None:
    """Return the copy of a file that need not be there, None where it is not."""
    try:
        return fetch([_persist(url, lambda: store_of(url).look_up(url))])[0]
    except (Missing, Denied):
        return None


def fetch(remotes: Sequence[Remote], advance: Advance = lambda done, total: None) -> list[Path]:
    """Return the copies of files in the cache folder; those that are not there are fetched.

    Several processes share the copies: one fetches a file, the others wait for it. What a cut or an ended process has
    left is gone on with.

    Args:
        advance: called with the megabytes fetched and the total.

    Raises:
        ValueError: the disk is too small, or a file cannot be fetched.
    """
    wanted = [remote for remote in remotes if not _is_whole(remote)]
    if not wanted:
        return [remote.place for remote in remotes]
    folder = cache_folder() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    check_space(wanted, folder)
    total, done, lock = sum(remote.size for remote in wanted), 0, threading.Lock()

    def count(number: int) -> None:
        nonlocal done
        with lock:
            done += number
            advance(done // 10**6, total // 10**6)

    stopped = threading.Event()
    stores = {urlsplit(remote.url)[:2]: store_of(remote.url) for remote in wanted}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch") as pool:
        waiting = [pool.submit(fetch_one, each, stores[urlsplit(each.url)[:2]], count, stopped) for each in wanted]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            stopped.set()
            for each in waiting:
                each.cancel()
            raise
    return [remote.place for remote in remotes]


def check_space(wanted: Sequence[Remote], folder: Path) -> None:
    """Raise a ValueError when the disk does not hold what is to be fetched."""
    drafts = sum(draft.stat().st_size for remote in wanted if (draft := _draft(remote)).exists())
    needed, free = sum(remote.size for remote in wanted) - drafts + _SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{len(wanted):,} shards need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; make room, "
            "or set VITRAIL_CACHE to a folder on a larger disk"
        )


def fetch_one(remote: Remote, store: Store, count: Callable[[int], None], stopped: threading.Event) -> None:
    """Fetch a file unless another process has."""
    from filelock import FileLock

    draft = _draft(remote)
    with FileLock(remote.place.with_name(f".{remote.place.name}.lock")):
        if _is_whole(remote):
            count(remote.size)
            return
        if not remote.mark:
            draft.unlink(missing_ok=True)  # of what content it is the beginning, nobody knows
        with draft.open("ab") as handle:
            count(handle.tell())

            def go_on() -> None:
                if stopped.is_set():
                    raise Refused("stopped")
                if handle.tell() > remote.size:
                    handle.truncate(0)
                for place, block in store.pieces(remote, handle.tell()) if handle.tell() < remote.size else ():
                    if stopped.is_set():
                        raise Refused("stopped")
                    assert place <= handle.tell()
                    if place < handle.tell():
                        count(place - handle.tell())
                        handle.truncate(place)
                        handle.seek(place)
                    handle.write(block)
                    count(len(block))
                    handle.flush()
                if handle.tell() != remote.size:
                    raise OSError(f"the connection ended after {handle.tell():,} of {remote.size:,} bytes")

            _persist(remote.url, go_on, handle.tell)
            os.fsync(handle.fileno())
        os.replace(draft, remote.place)


def _persist(url: str, do: Callable[[], Any], reached: Callable[[], int] = lambda: 0) -> Any:
    """Call a function until it succeeds, with growing pauses; give up after `TRIES` that reached nothing new.

    Raises:
        Missing, Denied: nothing is at the address, or nothing that may be read.
        ValueError: it failed for good.
    """
    failures, best = 0, reached()
    while True:
        try:
            return do()
        except FileNotFoundError:
            raise Missing(f"{url}: no such file") from None
        except PermissionError as error:
            raise Denied(f"{url}: must not be read: {first_line(error)}; give this machine the right to") from None
        except (Refused, NotImplementedError) as error:
            raise ValueError(f"{url}: cannot be read: {first_line(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            reason: Exception = error
        except Exception as error:
            # The packages behind fsspec raise errors of all kinds; those of their settings do not get better.
            if "Credentials" in type(error).__name__:
                raise ValueError(
                    f"{url}: {first_line(error)}; for a public bucket set FSSPEC_S3_ANON=true, else give credentials as "
                    "for any AWS program"
                ) from None
            reason = error
        failures = failures + 1 if reached() <= best else 1
        best = max(best, reached())
        if failures >= TRIES:
            there = f", with {best:,} bytes there" if best else ""
            raise ValueError(
                f"{url}: cannot be fetched: {first_line(reason)} ({failures} tries{there}). Check the address and the "
                "connection, and type the command again: it goes on from what is there"
            )
        time.sleep(PAUSE_S * 2 ** (failures - 1))


def _draft(remote: Remote) -> Path:
    return remote.place.with_name(f".{remote.place.name}.part")


def _is_whole(remote: Remote) -> bool:
    with contextlib.suppress(OSError):
        return remote.place.stat().st_size == remote.size
    return False
