"""Find class names that are easily confused, and folders that are one level too high or too low."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vitrail.data.datasets.base import SPLIT_NAMES
from vitrail.data.datasets.folder import subfolders
from vitrail.data.images.decode import is_image_name
from vitrail.data.problems import Problem

# Letters of Cyrillic and Greek that look like a Latin one, and the Latin ones in the same order.
_LOOK_ALIKE = str.maketrans(
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456\u0458\u0455\u0501\u03bf\u03b1\u03bd\u03b9", "aceopxyijsdoavi"
)


def label_problems(labels: Sequence[str]) -> list[Problem]:
    """Return the problems of class names that look alike but are not equal, or that have invisible characters."""
    problems = []
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        alike[skeleton(label)].append(label)
    for similar in alike.values():
        if len(similar) > 1:
            names = ", ".join(quoted(each) for each in similar)
            text = f"the classes {names} {difference(similar)}, and are {len(similar)} classes; rename them if one is meant"
            problems.append(Problem("warning", "name", tuple(similar), text))
    for label in labels:
        if label != label.strip() or any(unicodedata.category(char) in ("Cc", "Cf") for char in label):
            text = f"the class {quoted(label)} has spaces at its ends or characters that cannot be seen; rename it"
            problems.append(Problem("warning", "name", (label,), text))
    return problems


def skeleton(label: str) -> str:
    """Return a simplified name, equal for names that a person takes for the same."""
    plain = unicodedata.normalize("NFKC", label).casefold()
    plain = "".join(char for char in plain if unicodedata.category(char) not in ("Cc", "Cf"))
    return re.sub(r"[\s_-]+", "", plain.translate(_LOOK_ALIKE))


def difference(labels: Sequence[str]) -> str:
    """Return how names of one skeleton differ, for people."""
    if len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels):
        return "differ only in how Unicode writes the same letters (NFC, NFD)"
    if len({label.casefold() for label in labels}) < len(labels):
        return "differ only in capital and small letters"
    if len({re.sub(r"[\s_-]+", "", label).casefold() for label in labels}) < len(labels):
        return "differ only in spaces, hyphens and underscores"
    return "look alike"


def quoted(label: str) -> str:
    """Return a name in quotes; one that is not plain ASCII with its character codes, so that a difference is seen."""
    return repr(label) if label.isascii() else f"{label!r} ({ascii(label)[1:-1]})"


def level_problem(root: Path) -> Problem | None:
    """Return the problem of a folder that is one level too high or too low, or whose levels are swapped; None else."""
    folders = subfolders(root)
    if not folders:
        images = any(is_image_name(each.name) for each in root.iterdir())
        if not images:
            return None
        return _level_error(
            f"{root} is itself a folder of images, one level too low: give the folder above it, {_above(root)}"
        )
    if any(each.lower() in SPLIT_NAMES and subfolders(root / each) for each in folders):
        return None
    inner = {each: subfolders(root / each) for each in folders}
    splits = {name for each in inner.values() for name in each if name.lower() in SPLIT_NAMES}
    if len(folders) == 1 and inner[folders[0]]:
        return _level_error(f"{root} holds nothing but {folders[0]}/, one level too high: give {root / folders[0]}")
    if splits and all(each and {name.lower() for name in each} <= set(SPLIT_NAMES) for each in inner.values()):
        text = f"the splits {', '.join(sorted(splits))} are inside the classes; swap the levels: {root}/train/<class>/"
        return _level_error(text)
    shared = set.intersection(*map(set, inner.values()))
    if len(folders) > 1 and len(shared) > 1:
        text = (
            f"every folder of {root} holds the same folders ({', '.join(sorted(shared)[:5])}), which look like the classes; "
            f"the first level is taken as the class ({', '.join(folders[:5])}). Swap the levels if that is wrong"
        )
        return Problem("warning", "name", tuple(folders), text)
    return None


def _level_error(text: str) -> Problem:
    return Problem("error", "name", (), text)


def _above(root: Path) -> Path:
    return root.resolve().parent
