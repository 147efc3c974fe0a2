"""Open WebDataset shards: a tar, a range `train-{000..123}.tar` or a glob, on this machine or at an address.

Training needs any image at any time (see `train_loader`), so shards are listed, not streamed: the headers of each tar
are read once for the offsets of its images. Tars at an address are downloaded once to the cache folder.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from vitrail.data.datasets.base import SPLIT_NAMES, SPLITS, TarDataset, TarShard, file_identity
from vitrail.data.datasets.webdataset import remote
from vitrail.data.datasets.webdataset.shard_index import load_index
from vitrail.data.datasets.webdataset.shard_labels import ClassNames, join_shards
from vitrail.data.problems import Problem
from vitrail.data.progress import Bar, no_bar
from vitrail.lookup import shorten

# 6 threads took twice the time of 1 on a local disk, since they wait for each other; 2 hide a network disk's waiting.
_THREADS = 2
CLASSES = "classes.json"  # a file beside the shards: class names in the order of the numbers in .cls
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_address(source: str) -> bool:
    """Return whether a string is an address rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def is_shards(source: str) -> bool:
    """Return whether DATA names shards: an address, a name that ends in .tar, or a folder of tars and no folders."""
    if is_address(source):
        return True
    path = Path(source).expanduser()
    if path.is_dir():
        with os.scandir(path) as entries:
            members = [(each.name, each.is_dir()) for each in entries if not each.name.startswith(".")]
        return any(name.endswith(".tar") for name, _ in members) and not any(is_folder for _, is_folder in members)
    return source.lower().endswith((".tar", *COMPRESSED))


def open_shards(source: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"], bar: Bar = no_bar) -> TarDataset:
    """List the images of shards.

    Raises:
        ValueError: a shard is missing, is no whole tar or cannot be fetched, or a sample in it cannot be used.
    """
    source = source.removeprefix("file://")
    locations = expand(source)
    shards = fetched_shards(locations, bar) if is_address(locations[0]) else local_shards(locations)
    classes = find_classes(locations)
    with ThreadPoolExecutor(_THREADS) as pool, bar(f"listing {len(shards):,} shards") as advance:
        indexes = []
        for index in pool.map(lambda each: load_index(each.file, each.location, each.identity), shards):
            indexes.append(index)
            advance(len(indexes), len(shards))
    name = source if is_address(source) else Path(source).resolve().name
    splits = [split_in_name(shard) for shard in shards]
    dataset = join_shards(
        name, shards, indexes, classes=classes, splits=splits, limit_pixels=limit_pixels, damaged=damaged
    )
    # Braces name the shards one by one, so that none can be missing.
    gaps = [] if "{" in source else missing_shards([shard.location for shard in shards])
    return replace(dataset, problems=(*dataset.problems, *gaps))


def missing_shards(locations: Sequence[str]) -> list[Problem]:
    """Return the problem of numbers that are missing between those of shards; none where none is missing."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for location in locations:
        if number := re.search(r"(\d+)\.tar$", location):
            numbers.setdefault((location[: number.start()], len(number[1])), []).append(int(number[1]))
    missing = [
        f"{start}{number:0{width}d}.tar"
        for (start, width), each in numbers.items()
        for number in sorted(set(range(min(each), max(each))) - set(each))[:100]
    ]
    if not missing:
        return []
    text = f"between the shards that are there, {shorten(missing)} are missing: are images lost?"
    return [Problem("warning", "name", tuple(missing), text)]


def expand(source: str) -> list[str]:
    """Return the paths or addresses of the shards that DATA names, in the order of their names.

    Raises:
        ValueError: there are none, some are missing, or some are no tars.
    """
    from braceexpand import braceexpand

    if not is_address(source):
        source = os.path.expanduser(source)
        if os.path.isdir(source):
            return sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
        if os.path.exists(source):
            return check_tar_names([source])
    try:
        patterns = list(braceexpand(source, escape=False))
    except ValueError:
        raise ValueError(f"{source}: a brace is not closed; expected such as train-{{000..123}}.tar") from None
    locations = [location for pattern in patterns for location in expand_glob(pattern)]
    if len(set(locations)) < len(locations):
        repeated = next(location for location in locations if locations.count(location) > 1)
        raise ValueError(f"{source}: names {repeated} twice")
    check_tar_names(locations)
    missing = [] if is_address(source) else [location for location in locations if not os.path.isfile(location)]
    if missing:
        count = f"{len(missing)} of {len(locations)} shards are missing: " if len(locations) > 1 else ""
        raise ValueError(f"{count}{shorten(missing)}: no such file; fix the range, or restore the files")
    return locations


def shards_name(source: str) -> str:
    """Return a plain name for DATA that names shards: without ranges, globs and the names of splits."""
    path = re.sub(
        r"\{[^}]*\}|[*?[\]]", "", urlsplit(source)[1] + urlsplit(source).path if is_address(source) else source
    )
    for text in reversed(path.removesuffix(".tar").split("/")):
        words = [each for each in re.findall(r"[^-_]+[-_]*", text) if each.strip("-_").lower() not in SPLIT_NAMES]
        if any(letter.isalpha() for each in words for letter in each):
            return re.sub(r"[^A-Za-z0-9._-]", "_", "".join(words)).strip("._-")
    return "shards"


def expand_glob(pattern: str) -> list[str]:
    """Return the paths or addresses that match a pattern; one without wildcards as it is."""
    if is_address(pattern):
        pattern += "*.tar" if pattern.endswith("/") else ""
        return remote.list_addresses(pattern) if "*" in pattern else [pattern]
    if not glob.has_magic(pattern):
        return [pattern]
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"{pattern}: no file has such a name")
    return paths


def check_tar_names(locations: list[str]) -> list[str]:
    """Return the paths or addresses; raises a ValueError when one does not end in .tar."""
    for location in locations:
        path = (urlsplit(location).path if is_address(location) else location).lower()
        if path.endswith(COMPRESSED):
            raise ValueError(
                f"{location}: is compressed, so that no image can be read without all before it; unpack it once to .tar: "
                "images are compressed already"
            )
        if not path.endswith(".tar"):
            what = "of addresses, only tars of images are read" if is_address(location) else "is no tar"
            raise ValueError(f"{location}: {what}; expected a name that ends in .tar, such as train-{{000..123}}.tar")
    return locations


def stems(locations: Sequence[str]) -> list[str]:
    """Return short names of shards, each once: their paths below the folder that they share, without .tar."""
    paths = [urlsplit(each).path if is_address(each) else os.path.abspath(each) for each in locations]
    shared = posixpath.commonpath([posixpath.dirname(path) or "/" for path in paths])
    short = [posixpath.relpath(path, shared)[: -len(".tar")] for path in paths]
    return short if len(set(short)) == len(short) else [each.partition("://")[2][: -len(".tar")] for each in locations]


def local_shards(paths: Sequence[str]) -> list[TarShard]:
    """Return shards that are files on this machine."""
    shards = []
    for path, stem in zip(paths, stems(paths), strict=True):
        status, file = os.stat(path), os.path.abspath(path)
        identity = file_identity(file)
        if identity is None:
            raise ValueError(f"{path}: is no file")
        shards.append(TarShard(path, stem, file, (status.st_size, status.st_mtime_ns), identity))
    return shards


def fetched_shards(urls: Sequence[str], bar: Bar) -> list[TarShard]:
    """Return shards at addresses, which are downloaded to the cache folder where they are not there yet."""
    remotes = remote.inspect_addresses(urls)
    with bar(f"fetching {len(urls):,} shards (MB)") as advance:
        copies = remote.fetch(remotes, advance)
    shards = []
    for each, stem, copy in zip(remotes, stems(urls), copies, strict=True):
        status = os.stat(copy)
        # Identified by its store's mark, not by the copy: downloaded again, the same shard is the same.
        shards.append(
            TarShard(
                each.url, stem, str(copy), (status.st_size, status.st_mtime_ns), f"{each.url}\0{each.digest}".encode()
            )
        )
    return shards


def find_classes(locations: Sequence[str]) -> ClassNames | None:
    """Return the content of `classes.json` beside the shards, None where there is none.

    Raises:
        ValueError: it cannot be read, or folders of shards disagree on it.
    """
    found: dict[ClassNames | None, str] = {}
    for folder in dict.fromkeys(each[: each.rfind("/") + 1] for each in locations):
        location = folder + CLASSES
        if is_address(location):
            file = remote.fetch_optional(location)
        else:
            file = Path(location) if os.path.isfile(location) else None
        found[None if file is None else read_classes(file, location)] = location
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(found.values())}: are not the same; shards of one dataset have the same classes"
        )
    return next(iter(found))


def read_classes(file: Path, location: str) -> ClassNames:
    """Return the content of a `classes.json`: a list of names, or `{"classes": [names], "flip_reason": text}`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{location}: is no JSON ({error}); expected a list of class names in class order") from None
    names, reason = (
        (content.get("classes"), content.get("flip_reason", "")) if isinstance(content, dict) else (content, "")
    )
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names) or not names:
        raise ValueError(f"{location}: expected a list of class names in class order")
    if len(set(names)) < len(names):
        raise ValueError(f"{location}: has the class {next(name for name in names if names.count(name) > 1)!r} twice")
    return ClassNames(tuple(names), str(reason))


def split_in_name(shard: TarShard) -> int:
    """Return the index in `SPLITS` of the split in a shard's name (`photos-val-7.tar`) or folder, -1 without one.

    Raises:
        ValueError: the name has two.
    """
    folder, _, base = (urlsplit(shard.location).path if is_address(shard.location) else shard.file).rpartition("/")
    words = re.split(r"[-_.]", base.removesuffix(".tar").lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    if len(found) > 1:
        raise ValueError(f"{shard.location}: its name has the splits {' and '.join(sorted(found))}; rename it")
    split = next(iter(found), None) or SPLIT_NAMES.get(folder.rpartition("/")[2].lower())
    return -1 if split is None else SPLITS.index(split)
