"""Pieces of error messages: an unknown name with the nearest known one, a long list cut short, another error's first line."""

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
    """Return the message that `name` is no known `what`, with the nearest spelling and the known names."""
    names = [str(known_name) for known_name in known]
    lower = {known_name.lower(): known_name for known_name in reversed(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"; did you mean {lower[near[0]]!r}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(names)}"


def shorten(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """Return the first of many names as text, and how many more there are."""
    rest = len(names) - most
    return between.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
