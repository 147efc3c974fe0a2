"""Map a function over items in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield the results of a function for every item, in order, computed by threads a bounded number ahead.

    Each task takes several items: a task for each image would cost more than decoding a small JPEG.
    """
    number = workers or os.cpu_count() or 1
    iterator = iter(items)
    with ThreadPoolExecutor(number) as pool:

        def submit():
            chunk = list(islice(iterator, 32))
            return pool.submit(lambda: [function(item) for item in chunk]) if chunk else None

        waiting = [submit() for _ in range(2 * number)]
        while waiting:
            future = waiting.pop(0)
            if future is not None:
                waiting.append(submit())
                yield from future.result()
