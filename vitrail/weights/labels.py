"""Which class of one model is which class of another, by name."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence


def match_labels(known: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Return for each wanted label, by index, the known label that means the same, where there is exactly one.

    Equal names come first, then names that `normal` makes equal, then those that share a synonym: ImageNet's
    `tench, Tinca tinca` is `tench`. A name that could be two of the other side is taken for neither.
    """
    found: dict[int, int] = {}
    for keys in (_exact, _normal, _synonyms):
        holders: dict[str, set[int]] = defaultdict(set)
        for index, label in enumerate(known):
            for key in keys(label):
                holders[key].add(index)
        left = [index for index in range(len(wanted)) if index not in found]
        meant = {index: set().union(*(holders[key] for key in keys(wanted[index]))) for index in left}
        claims = Counter(index for indices in meant.values() for index in indices)
        taken = set(found.values())
        for index, indices in meant.items():
            if len(indices) == 1 and claims[only := next(iter(indices))] == 1 and only not in taken:
                found[index] = only
    return found


def normal(label: str) -> str:
    """Return a label without what people write differently: case, spaces, underscores, hyphens, forms of a character."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label)).strip().casefold()


def _exact(label: str) -> set[str]:
    return {label}


def _normal(label: str) -> set[str]:
    return {normal(label)} - {""}


def _synonyms(label: str) -> set[str]:
    return {normal(part) for part in label.split(",")} - {""}
