"""Statistics of how images are stored: format, colour mode, depth, frames, orientation; a few bytes an image."""

from __future__ import annotations

import os

import numpy as np

from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ENDINGS_OF, ImageInfo
from vitrail.data.problems import Kind, Problem

_SHORT_SIDE, _ASPECT = 8, 8  # a side below the first, or one that is longer than the other by more than the second


class FormatStats:
    """Format, colour mode, depth, frames and orientation of each image of a dataset; all arrays are [N].

    Attributes:
        modes: Pillow's names of colour modes, by code.
        formats: names of file formats, by code.
    """

    def __init__(self, count: int, limit_pixels: int) -> None:
        self.limit_pixels = limit_pixels
        self.modes, self.formats = [""], [""]
        self.mode, self.format = np.zeros(count, dtype=np.uint8), np.zeros(count, dtype=np.uint8)
        self.orientation, self.bits = np.ones(count, dtype=np.uint8), np.zeros(count, dtype=np.uint8)
        self.frames, self.alpha = np.ones(count, dtype=np.int32), np.zeros(count, dtype=bool)
        self.ok = np.zeros(count, dtype=bool)

    def note(self, index: int, info: ImageInfo) -> None:
        """Record the description of one file."""
        self.mode[index], self.format[index] = _code(self.modes, info.mode), _code(self.formats, info.format)
        self.orientation[index], self.bits[index] = info.orientation, info.bits
        self.frames[index], self.alpha[index], self.ok[index] = info.frames, info.alpha, info.verdict == "ok"

    def note_rows(self, indices: np.ndarray, rows: np.ndarray) -> None:
        """Keep what whole files are, as a scan has cached it (`vitrail.data.cache.scans.ROW`)."""
        described = rows["described"] == 1
        indices, rows = indices[described], rows[described]
        for name, names, codes in (("mode", self.modes, self.mode), ("format", self.formats, self.format)):
            for text in np.unique(rows[name]):
                codes[indices[rows[name] == text]] = _code(names, text.decode())
        self.orientation[indices], self.bits[indices] = rows["orientation"], rows["bits"]
        self.frames[indices], self.alpha[indices], self.ok[indices] = rows["frames"], rows["alpha"] == 1, True

    def counts(self, which: str) -> dict[str, int]:
        """Return how many images have each mode or format, the most frequent first."""
        names, codes = (self.modes, self.mode) if which == "modes" else (self.formats, self.format)
        counts = np.bincount(codes[self.ok], minlength=len(names))
        return {names[code]: int(counts[code]) for code in np.argsort(-counts, kind="stable") if counts[code]}


def _code(names: list[str], name: str) -> int:
    """Return the index of a name, which is added where it is new."""
    if name not in names:
        names.append(name)
    return names.index(name)


def format_problems(dataset: Dataset, stats: FormatStats, sizes: np.ndarray) -> list[Problem]:
    """Return the problems of images that are stored in an unusual way, with what Vitrail makes of them."""
    ok, modes = stats.ok, np.asarray(stats.modes)[stats.mode]
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    measured = ok & (short > 0)
    findings: tuple[tuple[Kind, np.ndarray, str], ...] = (
        (
            "orientation",
            ok & (stats.orientation > 1),
            "rotated by their EXIF data, as viewers do and many tools do not",
        ),
        ("mode", ok & (modes == "CMYK"), "CMYK, made for print; they become RGB by a plain formula, without profiles"),
        ("mode", ok & (stats.bits > 8), "of more than 8 bits a channel; they are scaled to 8"),
        ("mode", ok & ((modes == "P") | (modes == "PA")), "stored with a palette; they become RGB"),
        ("mode", ok & stats.alpha, "partly transparent; they are laid on white"),
        ("mode", ok & (stats.frames > 1), "of several frames or pages; only the first is used"),
        ("mode", measured & (short < _SHORT_SIDE), f"less than {_SHORT_SIDE} pixels high or wide"),
        ("mode", measured & (long > _ASPECT * short), f"more than {_ASPECT} times as long as wide"),
        ("name", ok & _misnamed(dataset, stats), "of another format than their names say; they are read nevertheless"),
    )
    return [_problem(dataset, kind, np.flatnonzero(which), text) for kind, which, text in findings if which.any()]


def _problem(dataset: Dataset, kind: Kind, indices: np.ndarray, text: str) -> Problem:
    """Return the problem of the images `indices`."""
    paths = tuple(dataset.paths[int(index)] for index in indices)
    number = "1 image is" if len(paths) == 1 else f"{len(paths):,} images are"
    return Problem("warning", kind, paths, f"{number} {text}, for instance {paths[0]}")


def _misnamed(dataset: Dataset, stats: FormatStats) -> np.ndarray:
    """Return for each file [N] whether its ending belongs to another format; no ending is not a wrong one."""
    wrong = np.zeros(len(dataset.paths), dtype=bool)
    for index in np.flatnonzero(stats.ok):
        ending = os.path.splitext(dataset.paths[int(index)])[1][1:].lower()
        known = ENDINGS_OF.get(stats.formats[stats.format[index]], (ending,))
        wrong[index] = bool(ending) and ending not in known
    return wrong
