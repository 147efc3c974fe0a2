"""One helpful error for every unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`, or raise an error that suggests the nearest known name.

    Raises:
        ValueError: `name` is not a key of `table`; the message lists what is known.
    """
    if name in table:
        return table[name]
    raise ValueError(unknown(what, name, table))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no known `what`, with the nearest spelling and the known names."""
    names = [str(each) for each in known]
    lower = {each.lower(): each for each in reversed(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(names)}"


def shorten(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """Return the first of many names, and how many more there are."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
