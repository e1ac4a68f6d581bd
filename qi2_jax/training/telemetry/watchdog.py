"""Ends a process that makes no progress, and says where it was waiting."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

from qi2_jax.training.telemetry import accounting

STATUS = 70  # EX_SOFTWARE
GRACE = 30.0  # seconds in which a watchdog that has bitten must have ended the process


class Watchdog:
    """If no phase begins for a while, writes all Python stacks and ends the process with a status that is not 0.

    A collective whose peer has died waits for ever, and a pod with it; a process that ends is started again. The status
    is `STATUS`, or 1 where C code holds Python's lock and the system's timer has to end the process. Stacks go to
    stderr and to `RUN/stacks-PROCESS.txt`, an "error" to the run's events.

    Args:
      seconds: limit of a phase without its own; 0 switches the watchdog off.
      directory: the run.

    Raises:
      ValueError: for a negative limit.
    """

    def __init__(self, seconds: float, directory: pathlib.Path):
        if seconds < 0:
            raise ValueError(f"watchdog limit is {seconds} s; give 0 (off) or more")
        self._seconds, self._directory = seconds, directory
        self._phase = ("the start", seconds, time.monotonic())  # replaced whole: two threads see it
        self._closed = threading.Event()
        self._stderr = sys.__stderr__ or sys.stderr  # not what a notebook or a test may have put in its place
        self._thread: threading.Thread | None = None
        if seconds:
            self._path = directory / f"stacks-{jax.process_index()}.txt"
            self._events = accounting.Events(directory)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, what: str, seconds: float | None = None) -> None:
        """Says that `what` begins now and may take `seconds`; None: the usual limit."""
        self._phase = (what, self._seconds if seconds is None else seconds, time.monotonic())

    @contextlib.contextmanager
    def phase(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """`beat` for a block; after it the phase around it begins anew."""
        outer = self._phase[:2]
        self.beat(what, seconds)
        try:
            yield
        finally:
            self.beat(*outer)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self) -> None:
        while True:
            what, limit, since = self._phase
            waited = time.monotonic() - since
            if waited >= limit:
                self._bite(what, limit, waited)
            # This thread cannot run while C code holds Python's lock; the timer of faulthandler needs no lock.
            faulthandler.dump_traceback_later(limit - waited + GRACE, exit=True, file=self._stderr)
            if self._closed.wait(min(1.0, max(limit - waited, 0.01))):
                faulthandler.cancel_dump_traceback_later()
                return

    def _bite(self, what: str, limit: float, waited: float) -> None:
        # Writing may hang as well, where it is the file system that does.
        faulthandler.dump_traceback_later(GRACE, exit=True, file=self._stderr)
        text = (
            f"watchdog: no progress for {waited:.0f} s in {what!r} (limit {limit:g} s); all stacks follow and are in "
            f"{self._path}; ending with status {STATUS}. A longer limit, or 0 for none, is set in the config\n"
        )
        print(text, file=self._stderr, flush=True)
        faulthandler.dump_traceback(self._stderr)
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file)
            self._events.write(accounting.ERROR, seconds=waited, message=f"watchdog: no progress in {what!r}")
        os._exit(STATUS)
