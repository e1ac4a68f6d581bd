"""Threads that compute results before they are used."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], count: int, threads: int = 1
) -> Generator[Result]:
    """Results of a function in the order of its items; threads compute the next `count` of them ahead of their use.

    An error is raised in the place of its result.

    Args:
      function: function that the threads call.
      items: arguments of the function; the caller's thread iterates over them.
      count: largest number of results that are being computed or waiting.
      threads: number of threads.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: collections.deque[Future[Result]] = collections.deque(
            pool.submit(function, item) for item in itertools.islice(remaining, count)
        )
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(items: Iterator[Item], count: int) -> Iterator[Item]:
    """The same items in the same order; a thread takes the next `count` from the iterator ahead of their use."""
    end: Any = object()
    taken = map_ahead(lambda _: next(items, end), itertools.count(), count)
    try:
        yield from itertools.takewhile(lambda item: item is not end, taken)
    finally:
        taken.close()
