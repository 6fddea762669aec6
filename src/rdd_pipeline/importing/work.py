"""Many files at once, in order, with a bar, holding a few of them in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rdd_pipeline.data.progress import tracked

MOST_THREADS = 16

Given = TypeVar("Given")
Found = TypeVar("Found")


def in_threads(
    function: Callable[[Given], Found], items: Sequence[Given], title: str
) -> Iterator[Found]:
    """`function` of each item, in their order. At most a few results wait at any time.

    Raises:
        Exception: What the function raises, of the first item that fails.
    """
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[Found]] = deque()

    def results() -> Iterator[Found]:
        left = iter(items)
        for item in left:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from tracked(results(), title, len(items))
        finally:
            for future in waiting:
                future.cancel()
