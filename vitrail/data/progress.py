"""Types of progress reports: a `Bar` opens a context whose value is called with the number done and the total."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

Advance = Callable[[int, int], None]
Bar = Callable[[str], contextlib.AbstractContextManager[Advance]]  # such as `Console.bar`


def no_bar(what: str) -> contextlib.AbstractContextManager[Advance]:
    """Return a context that shows no progress."""
    return contextlib.nullcontext(lambda done, total: None)
