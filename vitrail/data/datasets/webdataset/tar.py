"""Where the files in a tar lie: its headers, walked once and strictly. Nothing is ever unpacked.

Python's `tarfile` takes a damaged header in the middle for the end of the archive, and says nothing of what follows it;
here it is an error. Read are the forms that tar programs write today: ustar, GNU (long names, sizes above 8 GB), pax.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
END = bytes(BLOCK)
_AHEAD = 1 << 16
_LONGEST_NAME = 1 << 20
# How a file begins that is no tar, and what to do with it.
COMPRESSED = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd", b"PK": "unzip"
}  # fmt: skip
FILE, FOLDER = (b"0", b"\0", b"7"), b"5"
REFUSED = {
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """A plain file in a tar: its name as it is written there, its first byte, its length."""

    name: str
    start: int
    size: int


class TarReader:
    """Reads a tar at given places.

    Args:
        place: what messages call it.
    """

    def __init__(self, file: str | os.PathLike[str], place: str) -> None:
        self.place = place
        self.handle = open(file, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self.handle.fileno()).st_size
        self._held, self._held_at = b"", 0

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def read(self, start: int, size: int) -> bytes:
        """Return some bytes, fewer at the end of the file."""
        if not self._held_at <= start <= start + size <= self._held_at + len(self._held):
            self.handle.seek(start)
            self._held, self._held_at = self.handle.read(max(size, BLOCK * 4)), start
        return self._held[start - self._held_at : start - self._held_at + size]

    def members(self) -> Iterator[Member]:
        """Yield the plain files in their order; folders are left out.

        Raises:
            ValueError: this is no whole tar, or holds something else than files and folders.
        """
        at, last, told = 0, "", {}
        while True:
            header = self.read(at, BLOCK)
            if header == END:
                self.check_end(at + BLOCK)
                return
            self.check_header(header, at, last)
            kind, size = header[156:157], self.number(header[124:136], at)
            start = at + BLOCK
            if kind in (b"x", b"X", b"L", b"g", b"K"):  # about the next member
                self.check_inside(start, size, "a long name")
                if size > _LONGEST_NAME:
                    raise ValueError(f"{self.place}: is damaged at byte {at:,}: it tells of a name of {size:,} bytes")
                if kind in (b"x", b"X"):
                    told |= self.pax(self.read(start, size), at)
                elif kind == b"L":
                    told["path"] = _text(self.read(start, size))
            else:
                name = told.get("path") or _name(header)
                size = int(told["size"]) if "size" in told else size
                if any(key.startswith("GNU.sparse") for key in told):
                    kind = b"S"
                if kind in FILE and not name.endswith("/"):
                    self.check_inside(start, size, repr(name))
                    yield Member(name, start, size)
                elif kind != FOLDER and kind not in FILE:
                    what = REFUSED.get(kind, f"of the unknown kind {kind!r}")
                    raise ValueError(
                        f"{self.place}: {name!r} is {what}; only plain files are read. Write the shard anew without it, or "
                        "with what it leads to (GNU tar: --dereference --hard-dereference)"
                    )
                else:
                    size = 0
                last, told = name, {}
            at = start + -(-size // BLOCK) * BLOCK

    def check_header(self, header: bytes, at: int, last: str) -> None:
        """Raise a ValueError unless these are the 512 bytes of a header."""
        if len(header) < BLOCK and at:
            raise ValueError(
                f"{self.place}: is cut short: it ends after {last!r}, at byte {self.size:,}, without a tar's end mark; "
                "fetch or write it again"
            )
        try:
            right = int(header[148:156].strip(b" \0") or b"-1", 8) == sum(header[:148]) + 256 + sum(header[156:])
        except ValueError:
            right = False
        if right:
            return
        if at:
            raise ValueError(
                f"{self.place}: is damaged at byte {at:,}, after {last!r}: no header of a tar is there; fetch or write it "
                "again"
            )
        for start, program in COMPRESSED.items():
            if header.startswith(start):
                raise ValueError(
                    f"{self.place}: is compressed, so that no image can be read without all before it; unpack it once "
                    f"({program}): images are compressed already"
                )
        raise ValueError(f"{self.place}: is no tar (no header of one at the beginning of its {self.size:,} bytes)")

    def check_inside(self, start: int, size: int, what: str) -> None:
        """Raise a ValueError when the file ends before what it should hold."""
        if start + size > self.size:
            raise ValueError(
                f"{self.place}: is cut short: {what} should end at byte {start + size:,}, but the file has {self.size:,}; "
                "fetch or write it again"
            )

    def check_end(self, at: int) -> None:
        """Raise a ValueError when anything but zeros follows the end mark."""
        while block := self.read(at, _AHEAD):
            if block.count(0) != len(block):
                raise ValueError(
                    f"{self.place}: goes on after its end mark, as tars do that were joined by cat; what follows would "
                    "not be read. Join them by tar --concatenate, or name them one by one"
                )
            at += len(block)

    def number(self, field: bytes, at: int) -> int:
        """Return a number of a header: octal digits, or GNU's binary form."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        try:
            value = int(field.split(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            value = -1
        if value < 0:
            raise ValueError(f"{self.place}: is damaged at byte {at:,}: {field!r} is no size; fetch or write it again")
        return value

    def pax(self, content: bytes, at: int) -> dict[str, str]:
        """Return the records of a pax header, `length key=value`, that say where and what the next member is."""
        found, place = {}, 0
        while place < len(content) and content[place]:
            try:
                length = int(content[place : content.index(b" ", place)])
                record = content[place : place + length]
                key, value = record[record.index(b" ") + 1 : -1].split(b"=", 1)
                if length != len(record) or record[-1:] != b"\n" or (key == b"size" and int(value) < 0):
                    raise ValueError
            except ValueError:
                raise ValueError(f"{self.place}: is damaged at byte {at:,}: its pax header cannot be read") from None
            found[_text(key)] = _text(value)
            place += length
        return {key: value for key, value in found.items() if key in ("path", "size") or key.startswith("GNU.sparse")}


def _name(header: bytes) -> str:
    """Return the name of a header; GNU's use the field of the prefix for something else."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
