"""What SIGTERM does: it is noted, and ends the process with status 0 wherever that loses nothing. Without JAX.

An exception that a handler raises may be lost or changed on its way, in callbacks of the garbage collector or within
a library's event loop: so the note counts, and what a raised exception was turned into is turned back.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from qi2_jax.runtime import signals

# Signals belong to the process.
_received = False
_interruptible = False
_raised = False


class Terminated(SystemExit):
    """SIGTERM ends the process, with status 0.

    Attributes:
      told: whether the user was told already.
    """

    def __init__(self, told: bool = False):
        super().__init__(0)
        self.told = told


def received() -> bool:
    """Whether SIGTERM came to this process and waits."""
    return _received


def _receive(signum, frame) -> None:
    global _received, _interruptible, _raised
    _received = True
    if _interruptible:
        _interruptible = False  # a second one must not break what the first one ends
        _raised = True
        raise Terminated


def listen(*, interruptible: bool) -> None:
    """Handles SIGTERM from now on, for the rest of the process.

    Args:
      interruptible: it ends the process wherever it comes, but for blocks of `deferred`; otherwise in blocks of
        `interruptible` alone.
    """
    global _interruptible
    signal.signal(signal.SIGTERM, _receive)
    _interruptible = interruptible


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Around a program: after SIGTERM it ends with status 0, and further signals change nothing.

    Raises:
      Terminated: instead of an error that the interruption became on its way.
    """
    try:
        yield
    except (Exception, Terminated) as error:
        terminated = error if isinstance(error, Terminated) else Terminated() if _raised else None
        if terminated is None:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which Python leaves in place at its end
        if not terminated.told:
            print("SIGTERM: stopped; run again to continue", file=sys.stderr)
        raise terminated from (None if terminated is error else error)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block of the main thread that SIGTERM ends.

    Raises:
      Terminated: where SIGTERM comes, or came before.
    """
    global _interruptible
    before = _interruptible
    try:
        _interruptible = True
        if _received:  # looked at after the flag is set: none is missed in between
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
    """A block in which SIGTERM waits, any number of times; after it, it does what it did before.

    Raises:
      Terminated: after the block, if SIGTERM came and would have ended the process where the block began.
    """
    global _received, _raised, _interruptible
    before, _interruptible = _interruptible, False
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _receive)
    ended = False
    try:
        yield
        ended = True
    finally:
        _interruptible = before and not _raised
        if previous is not None and previous is not _receive:
            signal.signal(signal.SIGTERM, previous)
            waited, _received, _raised = _received, False, False
            if waited and ended:
                signal.raise_signal(signal.SIGTERM)
    if _received and _interruptible:
        raise Terminated


def listen_to_signals() -> None:
    """Lets SIGTERM end the process with status 0 wherever it loses nothing; a training saves first by itself.

    SIGUSR1, which asks a training for a trace, does nothing before it has begun.
    """
    signals.listen(interruptible=True)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
