"""What a training reads: batches that make updates, read in time and placed on the mesh."""

import collections
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from PIL import Image

from qi2_jax import sharding
from qi2_jax.training.compiled import Part
from qi2_jax.training.stopping import NEVER


class Feed(NamedTuple):
    """One batch of an update.

    Attributes:
      static: decides the compiled program, e.g. a layout.
      rows: this process's rows of the batch, as host arrays.
      batch_size: global number of images.
      composition: facts about the batch, for the logs.
      tokens: of the joint sequences, padding included.
      flops: model operations, see `planning.flops`; 0 where no formula is known.
    """

    static: Hashable
    rows: Any
    batch_size: int
    composition: dict[str, float]
    tokens: int = 0
    flops: float = 0.0


class Update(NamedTuple):
    """What one step reads: its batches, one after the other, and how many images they have together."""

    feeds: Iterable[Feed]
    images: int


class DataError(ValueError):
    """The data of an update cannot be read."""


class Reader:
    """Reads whole updates before their steps; one that cannot be read is known before its step begins.

    Args:
      updates: of the steps after `start`.
      start: the step from which a run continues.
      total: the last step; nothing is read beyond.
      mesh: where batches go.
      reading: entered around reading of data.
      fed: told of every batch that goes to the mesh.

    """

    def __init__(
        self,
        updates: Iterator[Update],
        start: int,
        total: int,
        mesh: Mesh,
        reading: Callable[[], AbstractContextManager],
        fed: Callable[[Feed], None],
    ):
        self._updates, self._next, self._total, self._mesh = updates, start + 1, total, mesh
        self._reading, self._fed = reading, fed
        self._ready: collections.deque[tuple[list[Feed], int]] = collections.deque()
        self._error: DataError | None = None

    def reach(self, step: int) -> int:
        """Reads up to the update of `step`; returns the last step that is possible, `NEVER` if no end is in sight."""
        while self._error is None and self._next <= min(step, self._total):
            try:
                with self._reading():
                    update = next(self._updates)
                    self._ready.append((list(update.feeds), update.images))
                self._next += 1
            except jax.errors.JaxRuntimeError:  # out of memory, say: no fault of the data
                raise
            except (OSError, RuntimeError, ValueError, KeyError, Image.DecompressionBombError) as error:
                told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                self._error = DataError(f"{told} (everything up to the step before is saved)")
                self._error.__cause__ = error
        return NEVER if self._error is None else self._next - 1

    def check(self) -> None:
        """Raises a DataError if an update could not be read."""
        if self._error is not None:
            raise self._error

    def parts(self) -> Iterator[Part]:
        """The batches of the next update, on the mesh."""
        feeds, images = self._ready.popleft()
        first = 0
        for feed in feeds:
            self._fed(feed)
            yield Part(feed.static, put(self._mesh, feed), first, feed.batch_size / images)
            first += feed.batch_size


def put(mesh: Mesh, feed: Feed) -> Any:
    """A batch on the mesh."""
    return sharding.put_batch(mesh, feed.rows, feed.batch_size)
