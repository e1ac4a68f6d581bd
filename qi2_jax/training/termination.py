"""SIGTERM to one of several processes, and while training; after which step all processes stop."""

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NEVER = np.iinfo(np.int32).max

# Signals belong to the process.
_received = False
_training = False  # the loop asks by itself
_interruptible = False


class Terminated(SystemExit):
    """SIGTERM ended a block of `interruptible`; of the whole process, status 0."""

    def __init__(self) -> None:
        super().__init__(0)


def received() -> bool:
    """Whether SIGTERM came to this process and waits."""
    return _received


def _receive(signum, frame) -> None:
    global _received, _interruptible
    _received = True
    if _interruptible:
        _interruptible = False  # a second one must not break what the first one ends
        raise Terminated


def defer() -> None:
    """Lets SIGTERM wait, for the rest of the process: for the next step, or the next block of `interruptible`."""
    signal.signal(signal.SIGTERM, _receive)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A block of the main thread that a deferred SIGTERM ends at once; not while training.

    Raises:
      Terminated: where SIGTERM comes, or came before.
    """
    global _interruptible
    if _training:
        yield
        return
    try:
        _interruptible = True
        if _received:  # looked at after the flag is set: none is missed in between
            raise Terminated
        yield
    finally:
        _interruptible = False


class Termination:
    """Lets SIGTERM wait while steps are taken and saved, any number of times; before and after it does what it did."""

    def __enter__(self):
        self._previous = None
        return self

    def begin(self) -> None:
        """From now on it waits."""
        global _training
        _training = True
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, _receive)

    @property
    def requested(self) -> bool:
        return _received

    def __exit__(self, kind, error, trace):
        global _received, _training
        _training = False
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            received, _received = _received, _received and self._previous is _receive
            if received and error is None:  # it came after the last step
                signal.raise_signal(signal.SIGTERM)


class LastStep:
    """The last step, on which all processes agree: each says how far it would go, and the least counts.

    What a process says after one step, all know `lag` steps later, when that step is computed: a process that wants to
    stop or cannot go on must still take `lag` steps. A single process knows at once.

    Args:
      mesh: devices of all processes.
      lag: in steps; with 0 the devices are waited for, which costs nothing where they are waited for anyway.
    """

    def __init__(self, mesh: Mesh, lag: int):
        self._lag, self._least, self._said = lag, NEVER, collections.deque[jax.Array | int]()
        self._several = jax.process_count() > 1
        if self._several:
            self._shape = (mesh.size,)
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._never = self._own(NEVER)
            self._min = jax.jit(jnp.min, out_shardings=everywhere).lower(self._never).compile()

    def _own(self, last: int) -> jax.Array:
        return jax.make_array_from_callback(self._shape, self._split, lambda _: np.full(1, last, np.int32))

    def known(self, last: int, *, wait: bool = False) -> int:
        """Says after a step how far this process would go, `NEVER` if for ever; returns what all know by now.

        Args:
          last: at least `lag` steps away.
          wait: for what all say now; every process must do so.
        """
        if self._several:
            self._said.append(self._min(self._never if last == NEVER else self._own(last)))
        else:
            self._said.append(last)
        while len(self._said) > (0 if wait else self._lag):
            self._least = min(self._least, int(self._said.popleft()))
        return self._least
