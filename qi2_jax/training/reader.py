"""Reads the updates of a training run ahead of their steps and copies them to the mesh."""

import collections
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax
from jax.sharding import Mesh
from PIL import Image

from qi2_jax.training.microbatch import Microbatch, put

NEVER = 2**31 - 1  # a step that is never reached


class DataError(ValueError):
    """The data of an update cannot be read."""


class Reader:
    """Reads whole updates before their steps begin, so that data that cannot be read never interrupts a step.

    Args:
      updates: microbatches of each step after `start`.
      start: step from which the run continues.
      total: last step; nothing is read beyond it.
      mesh: devices that receive the microbatches.
      reading: context manager that is entered around every read.
      on_put: callback for every microbatch that is copied to the mesh.
    """

    def __init__(
        self,
        updates: Iterator[Sequence[Microbatch]],
        start: int,
        total: int,
        mesh: Mesh,
        reading: Callable[[], AbstractContextManager],
        on_put: Callable[[Microbatch], None],
    ):
        self._updates, self._next, self._total, self._mesh = updates, start + 1, total, mesh
        self._reading, self._on_put = reading, on_put
        self._ready: collections.deque[Sequence[Microbatch]] = collections.deque()
        self._error: DataError | None = None

    def read_to(self, step: int) -> int:
        """Reads up to the update of `step`. Returns the last step that can be taken, or `NEVER` if no end is known."""
        while self._error is None and self._next <= min(step, self._total):
            try:
                with self._reading():
                    self._ready.append(next(self._updates))
                self._next += 1
            except jax.errors.JaxRuntimeError:  # such as out of memory, which is not a fault of the data
                raise
            except (OSError, RuntimeError, ValueError, KeyError, Image.DecompressionBombError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                self._error = DataError(f"{reason} (all steps before this one are saved)")
                self._error.__cause__ = error
        return NEVER if self._error is None else self._next - 1

    def raise_error(self) -> None:
        """Raises a DataError if an update could not be read."""
        if self._error is not None:
            raise self._error

    def microbatches(self) -> Iterator[Microbatch]:
        """The microbatches of the next update, each copied to the mesh on demand."""
        for microbatch in self._ready.popleft():
            self._on_put(microbatch)
            yield put(self._mesh, microbatch)
