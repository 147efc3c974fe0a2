"""Work spread over threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Map over threads and yield results in order, with a bounded number in flight.

    Items are handed over in runs: a task an image would cost more than a small JPEG's decode.
    """
    number = workers or os.cpu_count() or 1
    iterator = iter(items)
    with ThreadPoolExecutor(number) as pool:

        def submit():
            run = list(islice(iterator, 32))
            return pool.submit(lambda: [function(each) for each in run]) if run else None

        waiting = [submit() for _ in range(2 * number)]
        while waiting:
            future = waiting.pop(0)
            if future is not None:
                waiting.append(submit())
                yield from future.result()
