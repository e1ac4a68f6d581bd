"""Ends the process cleanly after SIGINT (Ctrl-C), SIGTERM or SIGHUP (closed terminal). Does not import JAX.

An exception that a signal handler raises can get lost, or can be replaced by another exception: inside callbacks of the
garbage collector, for instance, or in a library's event loop. The handler therefore records the signal before it
raises, and the context managers below consult that record.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from qi2_jax.runtime.streams import tolerate_lost_readers

# Exit statuses. A resumable command that SIGTERM ended is queued again, which is not a failure; others report 143.
STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129}
NOT_RESUMABLE = 143
MAX_STATUS = 125  # shells use those above for programs that cannot be started and for signals
# Environment variable with another status than 0 for a resumable command after SIGTERM. With it, a cluster can tell a
# preempted job from a finished one.
STOPPED_STATUS = "QI2_STOPPED_STATUS"

HINT_AFTER = 2.0  # seconds after the first Ctrl-C
REPEAT_AFTER = 0.3  # seconds; wrappers such as `uv run` forward the Ctrl-C that the terminal has delivered already

# The state of this process, like signals themselves.
_received: signal.Signals | None = None
_remote: signal.Signals | None = None  # what another process of the same program received
_interruptible = False
_raised = False
_resumable = True
_watching = False


class Terminated(SystemExit):
    """Ends the process after a signal.

    `code` is the exit status: 130 after SIGINT, 129 after SIGHUP, and after SIGTERM 0, or the value of `STOPPED_STATUS`
    in the environment. A command that cannot be resumed exits with 143 after SIGTERM.

    Attributes:
      reported: whether the user has been informed already.
    """

    def __init__(self, reported: bool = False):
        number = _received or _remote or signal.SIGTERM
        status = STATUS[number]
        if number == signal.SIGTERM:
            status = stopped_status() if _resumable else NOT_RESUMABLE
        super().__init__(status)
        self.reported = reported


def stopped_status() -> int:
    """Exit status of a resumable command after SIGTERM.

    Raises:
      ValueError: if the environment has another value than a status.
    """
    text = os.environ.get(STOPPED_STATUS, str(STATUS[signal.SIGTERM]))
    if not (text.isascii() and text.isdecimal() and int(text) <= MAX_STATUS):
        raise ValueError(
            f"{STOPPED_STATUS} is {text!r}; set it to an exit status from 0 to {MAX_STATUS} (75 is usual), or unset it"
        )
    return int(text)


def received() -> bool:
    """Whether this process received SIGTERM, SIGINT or SIGHUP and has not ended yet."""
    return bool(_received)


def name() -> str:
    """Name of the signal that ends this program, such as "SIGINT"; "" if there was none."""
    number = _received or _remote
    return number.name if number else ""


def record_remote(name_of_signal: str) -> None:
    """Records which signal another process of the same program received; it decides the exit status here as well."""
    global _remote
    _remote = _remote or signal.Signals[name_of_signal]


def stopped_message() -> str:
    """The line that says why the program ended."""
    return f"{name() or signal.SIGTERM.name}: stopped" + ("; run again to continue" if _resumable else "")


def _receive(number: int, frame: FrameType | None) -> None:
    global _received, _interruptible, _raised
    _received = _received or signal.Signals(number)
    if _interruptible:
        _interruptible = False  # a second signal must not break the cleanup that the first one started
        _raised = True
        raise Terminated


def _install() -> dict[signal.Signals, Any]:
    """Installs the handler for every signal that is not ignored, as under `nohup`. Returns the handlers before."""
    previous = {number: signal.getsignal(number) for number in STATUS}
    previous = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, _receive)
    return previous


def listen(*, interruptible: bool, resumable: bool = True) -> None:
    """Handles the signals for the rest of the process.

    The second Ctrl-C ends the process at once, even during a call into a library that takes minutes. SIGUSR1 is ignored
    until a training installs its handler, which records a trace.

    Args:
      interruptible: True: a signal ends the process anywhere except inside `deferred` blocks. False: only inside
        `interruptible` blocks.
      resumable: whether the same command continues the work; see `Terminated`.
    """
    global _interruptible, _resumable, _watching
    _install()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _interruptible, _resumable = interruptible, resumable
    if not _watching:
        _watching = True
        tolerate_lost_readers(received)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _watch(reader: int) -> None:
    """Waits for the second Ctrl-C in a thread, because Python's own handlers wait for calls into libraries."""
    first: float | None = None
    hint: float | None = None
    while True:
        left = None if hint is None else max(0.0, hint - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            hint = None
            _write("SIGINT: finishing the work in progress; press Ctrl-C again to end at once\n")
        elif os.read(reader, 1) == bytes([signal.SIGINT]):
            now = time.monotonic()
            if first is None:
                first, hint = now, now + HINT_AFTER
            elif now - first > REPEAT_AFTER:
                _write("SIGINT: ended at once\n")
                os._exit(STATUS[signal.SIGINT])


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Wraps a whole program: after a signal it exits with the signal's status and one message.

    Raises:
      Terminated: also in place of an error that the interruption turned into.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if isinstance(error, KeyboardInterrupt):
            record_remote(signal.SIGINT.name)
        elif not isinstance(error, Terminated) and not _raised:
            raise
        terminated = error if isinstance(error, Terminated) else Terminated()
        # Python leaves these in place while it shuts down. Ctrl-C still ends a shutdown that takes too long.
        for number in STATUS:
            if signal.getsignal(number) is _receive:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        if not terminated.reported:
            terminated.reported = True
            print(stopped_message(), file=sys.stderr)
        raise terminated from (None if terminated is error else error)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block of the main thread that a signal ends at once.

    Raises:
      Terminated: if a signal arrives in the block, or arrived before it.
    """
    global _interruptible
    before = _interruptible
    try:
        _interruptible = True
        if _received:  # checked after the flag is set, so that no signal is missed in between
            raise Terminated
        yield
    except Exception as error:
        if _raised:
            raise Terminated from error
        raise
    finally:
        _interruptible = before and not _raised
    if _received:
        raise Terminated


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A block in which signals wait. Afterwards the first one has the effect that it would have had before the block.

    Raises:
      Terminated: after the block, if a signal arrived that would have ended the process where the block began.
    """
    global _received, _raised, _interruptible
    before, _interruptible = _interruptible, False
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = _install() if in_main_thread else {}
    foreign = {number: old for number, old in previous.items() if old is not _receive}
    completed = False
    try:
        yield
        completed = True
    finally:
        _interruptible = before and not _raised
        for number, old in foreign.items():
            signal.signal(number, old)
        if _received in foreign:
            waiting, _received, _raised = _received, None, False
            if completed:
                signal.raise_signal(waiting)
    if _received and _interruptible:
        raise Terminated
