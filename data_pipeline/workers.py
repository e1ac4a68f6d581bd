"""Worker processes that start light and never outlive the process that started them."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

_T = TypeVar("_T")
_CHUNK = 4  # numbers sent to a process at once
_AHEAD = 4  # chunks per process that are asked for before they are needed


@contextlib.contextmanager
def process_pool(workers: int, purpose: str, make: Callable[[int], Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes; what is still waiting when the block is left is given up.

    Args:
      make: sent to each process once, for `in_order`.

    Raises:
      ChildProcessError: when one of them dies, naming `purpose`.
    """
    # Forking a process with threads (JAX has many) can deadlock, so workers start afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise ChildProcessError(
                f"a process for {purpose} died. What was finished is kept: run again, with workers=1 to see the error. "
                'A script that calls this must do so under `if __name__ == "__main__":`'
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_order(make: Callable[[int], _T], count: int, workers: int, purpose: str) -> Iterator[_T]:
    """make(0), make(1), .., make(count - 1), in this order, made by processes that run a little ahead.

    Args:
      make: a pure function, sent to each process once.
      workers: processes; 1: this process alone.

    Raises:
      ChildProcessError: as `process_pool`.
    """
    if workers == 1:
        yield from map(make, range(count))
        return
    starts = iter(range(0, count, _CHUNK))
    with process_pool(workers, purpose, make) as pool:
        waiting: deque[Future] = deque()
        while True:
            for start in itertools.islice(starts, _AHEAD * workers - len(waiting)):
                waiting.append(pool.submit(_make_chunk, start, min(count, start + _CHUNK)))
            if not waiting:
                return
            yield from waiting.popleft().result()


_make: Callable[[int], Any] | None = None  # of this worker process


def _start(make: Callable[[int], Any] | None) -> None:
    global _make
    _make = make
    _die_with_parent()


def _make_chunk(first: int, end: int) -> list[Any]:
    assert _make is not None
    return [_make(number) for number in range(first, end)]


def _die_with_parent() -> None:
    """Ends this process when its parent is killed: it would wait for work for ever, since it holds the pipe open."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
