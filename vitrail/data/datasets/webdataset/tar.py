"""Read the headers of a tar, once and strictly, for the offsets of its files. Nothing is unpacked.

Python's `tarfile` takes a damaged header in the middle for the end of the archive, and does not report what follows it;
here it is an error. Formats are those that tar programs write today: ustar, GNU (long names, sizes above 8 GB), pax.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
END = bytes(BLOCK)
_READ_BYTES = 1 << 16
_LONGEST_NAME = 1 << 20
# How a compressed file begins → the program that unpacks it.
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
    """A plain file in a tar: its name as written there, its offset and its length in bytes."""

    name: str
    start: int
    size: int


class TarReader:
    """Reads the members of a tar.

    Args:
        file: path of the tar.
        location: its path or address, as messages show it.
    """

    def __init__(self, file: str | os.PathLike[str], location: str) -> None:
        self.location = location
        self.handle = open(file, "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self.handle.fileno()).st_size
        self._buffer, self._buffer_start = b"", 0

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from offset `start`, fewer at the end of the file."""
        if not self._buffer_start <= start <= start + size <= self._buffer_start + len(self._buffer):
            self.handle.seek(start)
            self._buffer, self._buffer_start = self.handle.read(max(size, BLOCK * 4)), start
        return self._buffer[start - self._buffer_start : start - self._buffer_start + size]

    def members(self) -> Iterator[Member]:
        """Yield the plain files in order; folders are left out.

        Raises:
            ValueError: this is no whole tar, or it holds something other than files and folders.
        """
        at, last, extended = 0, "", {}
        while True:
            header = self.read(at, BLOCK)
            if header == END:
                self.check_end(at + BLOCK)
                return
            self.check_header(header, at, last)
            kind, size = header[156:157], self.number(header[124:136], at)
            start = at + BLOCK
            if kind in (b"x", b"X", b"L", b"g", b"K"):  # extended header: about the next member
                self.check_inside(start, size, "a long name")
                if size > _LONGEST_NAME:
                    raise ValueError(
                        f"{self.location}: is damaged at byte {at:,}: it announces a name of {size:,} bytes"
                    )
                if kind in (b"x", b"X"):
                    extended |= self.pax(self.read(start, size), at)
                elif kind == b"L":
                    extended["path"] = _text(self.read(start, size))
            else:
                name = extended.get("path") or _name(header)
                size = int(extended["size"]) if "size" in extended else size
                if any(key.startswith("GNU.sparse") for key in extended):
                    kind = b"S"
                if kind in FILE and not name.endswith("/"):
                    self.check_inside(start, size, repr(name))
                    yield Member(name, start, size)
                elif kind != FOLDER and kind not in FILE:
                    what = REFUSED.get(kind, f"of the unknown kind {kind!r}")
                    raise ValueError(
                        f"{self.location}: {name!r} is {what}; only plain files are read. Write the shard anew without it, or "
                        "with what it leads to (GNU tar: --dereference --hard-dereference)"
                    )
                else:
                    size = 0
                last, extended = name, {}
            at = start + -(-size // BLOCK) * BLOCK

    def check_header(self, header: bytes, at: int, last: str) -> None:
        """Raise a ValueError unless `header` is a whole header with the right checksum."""
        if len(header) < BLOCK and at:
            raise ValueError(
                f"{self.location}: is cut short: it ends after {last!r}, at byte {self.size:,}, without a tar's end mark; "
                "fetch or write it again"
            )
        try:
            is_valid = int(header[148:156].strip(b" \0") or b"-1", 8) == sum(header[:148]) + 256 + sum(header[156:])
        except ValueError:
            is_valid = False
        if is_valid:
            return
        if at:
            raise ValueError(
                f"{self.location}: is damaged at byte {at:,}, after {last!r}: no header of a tar is there; fetch or write it "
                "again"
            )
        for start, program in COMPRESSED.items():
            if header.startswith(start):
                raise ValueError(
                    f"{self.location}: is compressed, so that no image can be read without all before it; unpack it once "
                    f"({program}): images are compressed already"
                )
        raise ValueError(f"{self.location}: is no tar (no header of one at the beginning of its {self.size:,} bytes)")

    def check_inside(self, start: int, size: int, what: str) -> None:
        """Raise a ValueError when the file ends before `what`, which begins at `start`, does."""
        if start + size > self.size:
            raise ValueError(
                f"{self.location}: is cut short: {what} should end at byte {start + size:,}, but the file has {self.size:,}; "
                "fetch or write it again"
            )

    def check_end(self, at: int) -> None:
        """Raise a ValueError when anything but zeros follows the end mark."""
        while block := self.read(at, _READ_BYTES):
            if block.count(0) != len(block):
                raise ValueError(
                    f"{self.location}: goes on after its end mark, as tars do that were joined by cat; what follows would "
                    "not be read. Join them by tar --concatenate, or name them one by one"
                )
            at += len(block)

    def number(self, field: bytes, at: int) -> int:
        """Return the number in a field of a header: octal digits, or GNU's binary form."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        try:
            value = int(field.split(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            value = -1
        if value < 0:
            raise ValueError(
                f"{self.location}: is damaged at byte {at:,}: {field!r} is no size; fetch or write it again"
            )
        return value

    def pax(self, content: bytes, at: int) -> dict[str, str]:
        """Return the records of a pax header, `length key=value`, that give path, size or sparseness of the member."""
        records, start = {}, 0
        while start < len(content) and content[start]:
            try:
                length = int(content[start : content.index(b" ", start)])
                record = content[start : start + length]
                key, value = record[record.index(b" ") + 1 : -1].split(b"=", 1)
                if length != len(record) or record[-1:] != b"\n" or (key == b"size" and int(value) < 0):
                    raise ValueError
            except ValueError:
                raise ValueError(f"{self.location}: is damaged at byte {at:,}: its pax header cannot be read") from None
            records[_text(key)] = _text(value)
            start += length
        return {key: value for key, value in records.items() if key in ("path", "size") or key.startswith("GNU.sparse")}


def _name(header: bytes) -> str:
    """Return the name in a header; GNU tar uses the prefix field for something else."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    """Return a field as text, up to its first zero byte."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
