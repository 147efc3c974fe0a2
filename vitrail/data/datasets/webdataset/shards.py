"""Tars of images as WebDataset writes them: a file, a range `train-{000..123}.tar`, a glob, here or at an address.

Training asks for any image at any time (see `loader`), so shards are listed, not streamed: one walk over each tar's
headers says where its images lie. Tars on this machine are read in place; others are fetched once to the cache folder.
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

# More of them wait for each other: 6 took twice the time of 1 on a local disk; one waits for a network disk.
_THREADS = 2
CLASSES = "classes.json"  # beside the shards: class names in the order of the numbers in .cls
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_address(word: str) -> bool:
    """Whether a word is an address rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", word) is not None


def is_shards(word: str) -> bool:
    """Whether a word means tars: an address, a name that ends in .tar, or a folder that holds such files and no folders."""
    if is_address(word):
        return True
    place = Path(word).expanduser()
    if place.is_dir():
        with os.scandir(place) as entries:
            found = [(each.name, each.is_dir()) for each in entries if not each.name.startswith(".")]
        return any(name.endswith(".tar") for name, _ in found) and not any(folder for _, folder in found)
    return word.lower().endswith((".tar", *COMPRESSED))


def open_shards(word: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"], bar: Bar = no_bar) -> TarDataset:
    """List the images of shards.

    Raises:
        ValueError: a shard is missing, is no whole tar or cannot be fetched, or a sample in it cannot be used.
    """
    word = word.removeprefix("file://")
    words = expand(word)
    shards = fetched_shards(words, bar) if is_address(words[0]) else local_shards(words)
    classes = find_classes(words)
    with ThreadPoolExecutor(_THREADS) as pool, bar(f"listing {len(shards):,} shards") as advance:
        indexes = []
        for index in pool.map(lambda each: load_index(each.file, each.word, each.identity), shards):
            indexes.append(index)
            advance(len(indexes), len(shards))
    name = word if is_address(word) else Path(word).resolve().name
    parts = [split_in_name(each) for each in shards]
    found = join_shards(name, shards, indexes, classes=classes, parts=parts, limit_pixels=limit_pixels, damaged=damaged)
    # Braces say themselves which shards are meant.
    missing = [] if "{" in word else gaps([each.word for each in shards])
    return replace(found, problems=(*found.problems, *missing))


def gaps(words: Sequence[str]) -> list[Problem]:
    """Warn of numbers that are missing between those of shards with the same name."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for word in words:
        if number := re.search(r"(\d+)\.tar$", word):
            numbers.setdefault((word[: number.start()], len(number[1])), []).append(int(number[1]))
    missing = [
        f"{start}{number:0{width}d}.tar"
        for (start, width), each in numbers.items()
        for number in sorted(set(range(min(each), max(each))) - set(each))[:100]
    ]
    if not missing:
        return []
    text = f"between the shards that are there, {shorten(missing)} are missing: are images lost?"
    return [Problem("warning", "name", tuple(missing), text)]


def expand(word: str) -> list[str]:
    """Return the paths or addresses of the shards that a word means, in the order of their names.

    Raises:
        ValueError: there are none, some are not there, or they are no tars.
    """
    from braceexpand import braceexpand

    if not is_address(word):
        word = os.path.expanduser(word)
        if os.path.isdir(word):
            return sorted(glob.glob(os.path.join(glob.escape(word), "*.tar")))
        if os.path.exists(word):
            return refuse_others([word])
    try:
        each = list(braceexpand(word, escape=False))
    except ValueError:
        raise ValueError(f"{word}: a brace is not closed; expected such as train-{{000..123}}.tar") from None
    words = [found for pattern in each for found in matches(pattern)]
    if len(set(words)) < len(words):
        twice = next(found for found in words if words.count(found) > 1)
        raise ValueError(f"{word}: names {twice} twice")
    refuse_others(words)
    gone = [] if is_address(word) else [found for found in words if not os.path.isfile(found)]
    if gone:
        count = f"{len(gone)} of {len(words)} shards are missing: " if len(words) > 1 else ""
        raise ValueError(f"{count}{shorten(gone)}: no such file; mend the range, or restore the files")
    return words


def shards_name(word: str) -> str:
    """Return a plain name for a word that means shards: what stays of it without ranges and the names of parts."""
    path = re.sub(r"\{[^}]*\}|[*?[\]]", "", urlsplit(word)[1] + urlsplit(word).path if is_address(word) else word)
    for text in reversed(path.removesuffix(".tar").split("/")):
        words = [each for each in re.findall(r"[^-_]+[-_]*", text) if each.strip("-_").lower() not in SPLIT_NAMES]
        if any(letter.isalpha() for each in words for letter in each):
            return re.sub(r"[^A-Za-z0-9._-]", "_", "".join(words)).strip("._-")
    return "shards"


def matches(pattern: str) -> list[str]:
    """Return what a pattern with `*` stands for, and anything else as it is."""
    if is_address(pattern):
        pattern += "*.tar" if pattern.endswith("/") else ""
        return remote.list_addresses(pattern) if "*" in pattern else [pattern]
    if not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ValueError(f"{pattern}: no file has such a name")
    return found


def refuse_others(words: list[str]) -> list[str]:
    """Return the words, unless one does not end as a tar does."""
    for word in words:
        path = (urlsplit(word).path if is_address(word) else word).lower()
        if path.endswith(COMPRESSED):
            raise ValueError(
                f"{word}: is compressed, so that no image can be read without all before it; unpack it once to .tar: "
                "images are compressed already"
            )
        if not path.endswith(".tar"):
            what = "of addresses, only tars of images are read" if is_address(word) else "is no tar"
            raise ValueError(f"{word}: {what}; expected a name that ends in .tar, such as train-{{000..123}}.tar")
    return words


def stems(words: Sequence[str]) -> list[str]:
    """Return short names of shards, each once: their paths below the folder that they share, without .tar."""
    paths = [urlsplit(word).path if is_address(word) else os.path.abspath(word) for word in words]
    shared = posixpath.commonpath([posixpath.dirname(path) or "/" for path in paths])
    short = [posixpath.relpath(path, shared)[: -len(".tar")] for path in paths]
    return short if len(set(short)) == len(short) else [word.partition("://")[2][: -len(".tar")] for word in words]


def local_shards(words: Sequence[str]) -> list[TarShard]:
    """Return shards that are files on this machine."""
    shards = []
    for word, stem in zip(words, stems(words), strict=True):
        found, place = os.stat(word), os.path.abspath(word)
        identity = file_identity(place)
        if identity is None:
            raise ValueError(f"{word}: is no file")
        shards.append(TarShard(word, stem, place, (found.st_size, found.st_mtime_ns), identity))
    return shards


def fetched_shards(urls: Sequence[str], bar: Bar) -> list[TarShard]:
    """Return shards at addresses, of which the cache folder then has copies."""
    found = remote.inspect_addresses(urls)
    with bar(f"fetching {len(urls):,} shards (MB)") as advance:
        places = remote.fetch(found, advance)
    shards = []
    for each, stem, place in zip(found, stems(urls), places, strict=True):
        state = os.stat(place)
        # By what its store says, not by the copy: fetched again, the same shard is the same.
        shards.append(
            TarShard(
                each.url, stem, str(place), (state.st_size, state.st_mtime_ns), f"{each.url}\0{each.digest}".encode()
            )
        )
    return shards


def find_classes(words: Sequence[str]) -> ClassNames | None:
    """Return what `classes.json` beside the shards says, None where there is none.

    Raises:
        ValueError: it cannot be read, or folders of shards disagree on it.
    """
    found: dict[ClassNames | None, str] = {}
    for folder in dict.fromkeys(word[: word.rfind("/") + 1] for word in words):
        place = folder + CLASSES
        if is_address(place):
            copy = remote.optional(place)
        else:
            copy = Path(place) if os.path.isfile(place) else None
        found[None if copy is None else read_classes(copy, place)] = place
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(found.values())}: are not the same; shards of one dataset have the same classes"
        )
    return next(iter(found))


def read_classes(file: Path, place: str) -> ClassNames:
    """Return what a `classes.json` says: a list of names, or `{"classes": [names], "flip_reason": text}`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place}: is no JSON ({error}); expected a list of class names in class order") from None
    names, reason = (
        (content.get("classes"), content.get("flip_reason", "")) if isinstance(content, dict) else (content, "")
    )
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names) or not names:
        raise ValueError(f"{place}: expected a list of class names in class order")
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: has the class {next(name for name in names if names.count(name) > 1)!r} twice")
    return ClassNames(tuple(names), str(reason))


def split_in_name(shard: TarShard) -> int:
    """Return the number of the part that a shard's name (`train-000.tar`, `photos-val-7.tar`) or folder tells, else -1.

    Raises:
        ValueError: the name tells two.
    """
    folder, _, base = (urlsplit(shard.word).path if is_address(shard.word) else shard.file).rpartition("/")
    words = re.split(r"[-_.]", base.removesuffix(".tar").lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    if len(found) > 1:
        raise ValueError(f"{shard.word}: its name tells the parts {' and '.join(sorted(found))}; rename it")
    part = next(iter(found), None) or SPLIT_NAMES.get(folder.rpartition("/")[2].lower())
    return -1 if part is None else SPLITS.index(part)
