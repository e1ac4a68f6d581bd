"""Worker processes that start without state, keep quiet on Ctrl-C, and never outlive the process that started them."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any, TypeVar

_T = TypeVar("_T")
_CHUNK = 4  # numbers sent to a worker at once
_AHEAD = 4  # chunks per worker that are requested before they are needed
_PATIENCE = 10.0  # seconds for interrupted tasks to remove their partial files
_HANDLED_BY_PARENT = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to all processes alike


class _Worker(multiprocessing.context.SpawnProcess):
    """A process in which Ctrl-C has no effect from its very start, when it still imports libraries."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED_BY_PARENT)  # the new process inherits the mask
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawn(multiprocessing.context.SpawnContext):
    """Starts processes without forking, which can deadlock in a process with threads; JAX has many."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *args: Any, **kwargs: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
        self.started.append(_Worker(*args, **kwargs))
        return self.started[-1]


class _Pool(ProcessPoolExecutor):
    """A pool whose tasks SIGTERM interrupts."""

    def submit(self, task: Callable[..., _T], /, *args: Any) -> Future[_T]:  # type: ignore[override]
        return super().submit(_run_task, task, *args)


@contextlib.contextmanager
def process_pool(workers: int, purpose: str, make: Callable[[int], Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Starts a pool of processes. Leaving the block cancels the tasks that have not started.

    If an exception leaves the block, such as that of a signal, the running tasks are interrupted as well; their
    `finally` clauses remove partial files.

    Args:
      workers: number of processes.
      purpose: purpose of the processes, for error messages.
      make: function that is sent to each process once, for `in_order`.

    Raises:
      ChildProcessError: if a process dies.
    """
    context = _Spawn()
    with _Pool(workers, mp_context=context, initializer=_start, initargs=(make,)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise ChildProcessError(
                f"a process for {purpose} died. Finished work is kept: run again, with workers=1 to see the error. "
                'A script that calls this must do so under `if __name__ == "__main__":`'
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _interrupt(context.started)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _interrupt(processes: list[_Worker]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + _PATIENCE
    while alive := [process for process in processes if process.is_alive()]:
        if time.monotonic() > end:
            for process in alive:
                process.kill()
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)


def in_order(make: Callable[[int], _T], count: int, workers: int, purpose: str) -> Iterator[_T]:
    """Yields make(0), make(1), ..., make(count - 1) in this order, computed by processes that run a little ahead.

    Args:
      make: pure function; it is sent to each process once.
      count: number of calls.
      workers: number of processes; 1 means this process alone.
      purpose: purpose of the processes, for error messages.

    Raises:
      ChildProcessError: see `process_pool`.
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


# State of a worker process: the function of `in_order`, and whether a task is running.
_make: Callable[[int], Any] | None = None
_running = False


class _Interrupted(SystemExit):
    """Ends a task after SIGTERM, so that its `finally` clauses run."""


def _start(make: Callable[[int], Any] | None) -> None:
    global _make
    _make = make
    for number in _HANDLED_BY_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_task)
    _die_with_parent()


def _stop_task(number: int, frame: FrameType | None) -> None:
    if _running:
        raise _Interrupted
    os._exit(128 + number)


def _run_task(task: Callable[..., _T], *args: Any) -> _T:
    global _running
    _running = True
    try:
        return task(*args)
    except _Interrupted:
        os._exit(128 + signal.SIGTERM)
    finally:
        _running = False


def _make_chunk(first: int, end: int) -> list[Any]:
    assert _make is not None
    return [_make(number) for number in range(first, end)]


def _die_with_parent() -> None:
    """Ends this process when its parent is killed. Otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
