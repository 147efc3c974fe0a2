"""A sequence of strings in one buffer of bytes: a million paths as a list of `str` would take twice the memory."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

_CHUNK = 65_536


class StringArray(Sequence[str]):
    """A sequence of strings that can be extended, not changed; a `str` is made when one is read.

    A file name that is no Unicode text is kept exactly, by surrogate escapes.
    """

    __slots__ = ("_buffer", "_starts")

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._buffer, self._starts = bytearray(), array("q", [0])
        self.extend(strings)

    def append(self, text: str) -> None:
        """Add one string."""
        self._buffer += text.encode("utf-8", "surrogateescape")
        self._starts.append(len(self._buffer))

    def extend(self, strings: Iterable[str]) -> None:
        """Add strings in their order."""
        for text in strings:
            self.append(text)

    @classmethod
    def from_arrays(cls, buffer: np.ndarray, starts: np.ndarray) -> StringArray:
        """Return the strings that `arrays` has returned as arrays."""
        strings = cls()
        strings._buffer, strings._starts = bytearray(buffer.tobytes()), array("q", starts.tobytes())
        return strings

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all bytes [num_bytes] and the offset of each string [N + 1], to be stored in a file."""
        return np.frombuffer(bytes(self._buffer), dtype=np.uint8), np.frombuffer(self._starts.tobytes(), dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        """Memory that the strings take."""
        return len(self._buffer) + len(self._starts) * self._starts.itemsize

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = operator.index(index)
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        raw = self._buffer[self._starts[position] : self._starts[position + 1]]
        return raw.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            starts = self._starts[start : start + _CHUNK + 1]
            whole = bytes(self._buffer[starts[0] : starts[-1]])
            for left, right in pairwise(starts):
                yield whole[left - starts[0] : right - starts[0]].decode("utf-8", "surrogateescape")

    def __repr__(self) -> str:
        return f"<{len(self):,} paths, {self.num_bytes:,} bytes>"


def positions_of(paths: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return the index of each name in `paths` [len(names)], -1 where it is missing; by hashes, without a dict."""
    keys = _hashes(paths)
    order = np.argsort(keys, kind="stable")
    name_keys = _hashes(names)
    left = np.searchsorted(keys[order], name_keys, side="left")
    positions = np.full(len(name_keys), -1, dtype=np.int64)
    for number, (rank, name) in enumerate(zip(left.tolist(), names, strict=True)):
        while rank < len(order) and keys[order[rank]] == name_keys[number]:
            if paths[int(order[rank])] == name:
                positions[number] = order[rank]
                break
            rank += 1  # another string of the same hash
    return positions


def first_repeated(paths: Sequence[str]) -> tuple[int, int] | None:
    """Return the two indices of the first string that occurs twice, or None."""
    keys = _hashes(paths)
    order = np.argsort(keys, kind="stable")
    equal = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    pairs = sorted((int(order[each + 1]), int(order[each])) for each in equal)
    return next(((first, second) for second, first in pairs if paths[first] == paths[second]), None)


def _hashes(strings: Iterable[str]) -> np.ndarray:
    """Return a 64-bit hash of each string, valid within this process."""
    return np.fromiter(map(hash, strings), dtype=np.int64)
