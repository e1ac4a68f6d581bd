"""Ends a process that makes no progress, and reports where it hung."""

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
GRACE = 30.0  # seconds after which a process whose watchdog has expired is ended by force


class Watchdog:
    """Ends the process with a non-zero status if no new phase begins in time, after writing all Python stacks.

    A collective whose peer has died waits for ever, and the whole pod with it, whereas a process that ends is started
    again. The status is `STATUS`, or 1 if C code holds Python's lock and the system's timer has to end the process. The
    stacks go to stderr and to `RUN/stacks-PROCESS.txt`, and an "error" to the events of the run.

    Args:
      seconds: default time limit of a phase; 0 switches the watchdog off.
      directory: folder of the run.

    Raises:
      ValueError: if the limit is negative.
    """

    def __init__(self, seconds: float, directory: pathlib.Path):
        if seconds < 0:
            raise ValueError(f"watchdog limit is {seconds} s; give 0 (off) or more")
        self._seconds, self._directory = seconds, directory
        self._phase = ("the start", seconds, time.monotonic())  # replaced as a whole, because two threads read it
        self._closed = threading.Event()
        self._stderr = sys.__stderr__ or sys.stderr  # the real one, even in a notebook or a test
        self._thread: threading.Thread | None = None
        if seconds:
            self._path = directory / f"stacks-{jax.process_index()}.txt"
            self._events = accounting.Events(directory)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, what: str, seconds: float | None = None) -> None:
        """Starts the phase `what`, which may take `seconds`; None for the usual limit."""
        self._phase = (what, self._seconds if seconds is None else seconds, time.monotonic())

    @contextlib.contextmanager
    def phase(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """A block as a phase. After it the surrounding phase starts again."""
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
                self._expire(what, limit, waited)
            # This thread cannot run while C code holds Python's lock. The timer of faulthandler needs no lock.
            faulthandler.dump_traceback_later(limit - waited + GRACE, exit=True, file=self._stderr)
            if self._closed.wait(min(1.0, max(limit - waited, 0.01))):
                faulthandler.cancel_dump_traceback_later()
                return

    def _expire(self, what: str, limit: float, waited: float) -> None:
        # Writing hangs as well if the file system does.
        faulthandler.dump_traceback_later(GRACE, exit=True, file=self._stderr)
        text = (
            f"watchdog: no progress for {waited:.0f} s in {what!r} (limit {limit:g} s); all stacks follow and are in "
            f"{self._path}. Ending with status {STATUS}. train.watchdog_seconds in the config sets the limit, or 0 for "
            "none\n"
        )
        print(text, file=self._stderr, flush=True)  # not logged: the thread that hangs may hold the lock of logging
        faulthandler.dump_traceback(self._stderr)
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file)
            self._events.write(accounting.ERROR, seconds=waited, message=f"watchdog: no progress in {what!r}")
        os._exit(STATUS)
