"""Readers of files at an address: over HTTP by Python itself, from all other stores through fsspec."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import vitrail
from vitrail.files import cache_folder
from vitrail.lookup import first_line

TIMEOUT_S = 30
BLOCK_BYTES = 8 << 20  # of one request where a store is read by ranges
_MARKS = (
    "ETag",
    "etag",
    "md5",
    "blob_id",
    "generation",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)


class Refused(Exception):
    """Raised for an answer that another try would not change."""


@dataclass(frozen=True)
class Remote:
    """A file at an address.

    Attributes:
        size: its length in bytes.
        mark: the store's version mark, which changes when the content does; empty where it gives none.
    """

    url: str
    size: int
    mark: str

    @property
    def digest(self) -> str:
        """A hash of address, size and mark, which differs when the content does."""
        return hashlib.blake2b(f"{self.url}\0{self.size}\0{self.mark}".encode(), digest_size=12).hexdigest()

    @property
    def copy_path(self) -> Path:
        """The path of its copy in the cache folder, whether it exists or not."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(urlsplit(self.url).path))[-60:]
        return cache_folder() / "shards" / f"{self.digest}-{stem}"


class Store(Protocol):
    """Reads files at one kind of address."""

    def inspect(self, url: str) -> Remote:
        """Return the size and mark of the file at an address; raises `FileNotFoundError` where there is none."""
        ...

    def blocks(self, remote: Remote, start: int) -> Iterator[tuple[int, bytes]]:
        """Yield the file from byte `start`, as (offset, bytes); from byte 0 where the store has no ranges."""
        ...


class HttpStore:
    """Reads `http://` and `https://`, by ranges where the server has them."""

    def inspect(self, url: str) -> Remote:
        # Not HEAD: addresses that were signed for reading refuse it.
        with self._open(url, {"Range": "bytes=0-0"}) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            length = total if answer.status == 206 else answer.headers.get("Content-Length", "")
            if not length.isdecimal():
                raise Refused("the server does not say how long the file is, so that a cut would not be noticed")
            return Remote(url, int(length), _mark(answer.headers))

    def blocks(self, remote: Remote, start: int) -> Iterator[tuple[int, bytes]]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._open(remote.url, headers) as answer:
            if _mark(answer.headers) != remote.mark:
                raise Refused("the file was changed while it was fetched; type the command again")
            offset = start if answer.status == 206 else 0
            if answer.status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Refused(f"the server sent another range than byte {start:,} and on")
            while block := answer.read(1 << 20):
                yield offset, block
                offset += len(block)

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        own = {"User-Agent": f"vitrail/{vitrail.__version__}", "Accept-Encoding": "identity"}
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=own | headers), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (404, 410):
                    raise FileNotFoundError(url) from None
                text = f"the server answers {error.code} {error.reason}"
            if error.code in (401, 403):
                raise PermissionError(text) from None
            if error.code == 416:
                raise Refused("the file is empty") from None
            if error.code in (408, 429) or error.code >= 500:
                raise OSError(text) from None
            raise Refused(text) from None


class FsspecStore:
    """Reads every address that fsspec knows, by ranges of a few megabytes."""

    def __init__(self, url: str) -> None:
        import fsspec

        scheme = urlsplit(url).scheme
        try:
            self.files, _ = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = "'vitrail[s3]'" if scheme in ("s3", "s3a") else _package(error)
            raise ValueError(
                f"{url}: addresses of {scheme}:// need another package; type pip install {extra}"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{url}: {first_line(error)}; expected http://, https://, s3://, or what fsspec knows"
            ) from None
        self.files.invalidate_cache()

    def inspect(self, url: str) -> Remote:
        info = self.files.info(self.files._strip_protocol(url))
        if info.get("size") is None:
            raise Refused("the store does not say how long the file is, so that a cut would not be noticed")
        marks = (info.get(key) for key in _MARKS)
        return Remote(url, int(info["size"]), next((str(mark) for mark in marks if mark), ""))

    def blocks(self, remote: Remote, start: int) -> Iterator[tuple[int, bytes]]:
        path = self.files._strip_protocol(remote.url)
        for offset in range(start, remote.size, BLOCK_BYTES):
            end = min(offset + BLOCK_BYTES, remote.size)
            block = self.files.cat_file(path, start=offset, end=end)
            if len(block) != end - offset:
                raise OSError(f"bytes {offset:,} to {end:,} were asked for, and {len(block):,} came")
            yield offset, block
        self.files.invalidate_cache()
        if self.inspect(remote.url) != remote:
            raise Refused("the file was changed while it was fetched; type the command again")


def store_of(url: str) -> Store:
    """Return the reader for an address.

    Raises:
        ValueError: nothing here knows this kind of address, or its package is not installed.
    """
    return HttpStore() if urlsplit(url).scheme in ("http", "https") else FsspecStore(url)


def _mark(headers: Any) -> str:
    """Return the version mark in the headers of an answer; empty where there is none."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _package(error: Exception) -> str:
    """Return the package that fsspec's message asks for."""
    names = re.findall(r"[Ii]nstall (?:the )?[`'\"]?([A-Za-z0-9_-]+)", str(error))
    return names[0] if names else "fsspec[full]"
