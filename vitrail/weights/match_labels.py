"""Match the classes of two models by their names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence


def match_labels(known: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Return the index of the known label that means the same, by the index of each wanted label that has exactly one.

    Equal names come first, then names that are equal after `normalise_label`, then names that share a synonym: ImageNet's
    `tench, Tinca tinca` is `tench`. A name that could mean two labels is matched with neither.
    """
    matches: dict[int, int] = {}
    for keys in (_exact, _normal, _synonyms):
        holders: dict[str, set[int]] = defaultdict(set)
        for index, label in enumerate(known):
            for key in keys(label):
                holders[key].add(index)
        left = [index for index in range(len(wanted)) if index not in matches]
        meanings = {index: set().union(*(holders[key] for key in keys(wanted[index]))) for index in left}
        claims = Counter(index for indices in meanings.values() for index in indices)
        taken = set(matches.values())
        for index, indices in meanings.items():
            if len(indices) == 1 and claims[only := next(iter(indices))] == 1 and only not in taken:
                matches[index] = only
    return matches


def normalise_label(label: str) -> str:
    """Return a label in lower case, with single spaces for underscores and hyphens, and characters in one Unicode form."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label)).strip().casefold()


def _exact(label: str) -> set[str]:
    return {label}


def _normal(label: str) -> set[str]:
    return {normalise_label(label)} - {""}


def _synonyms(label: str) -> set[str]:
    return {normalise_label(part) for part in label.split(",")} - {""}
