"""Work done ahead of its use, by threads, in order and in bounded memory."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, ahead: int
) -> Iterator[Result]:
    """`map(function, items)`, with up to `ahead` results under way or waiting to be taken.

    Unlike `ThreadPoolExecutor.map`, which starts everything at once. What the function raises
    comes out at its place; closing the iterator drops what has not been started.
    """
    pool = ThreadPoolExecutor(num_threads)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
