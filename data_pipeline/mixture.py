"""Mixtures: batches of several streams (resolutions, tasks) in exact proportions, a pure function of the step.

A stream has batches of one layout and one size, so a step compiles into one of few programs. The streams take turns in
cycles of as many steps as their weights add up to; the order within a cycle is drawn from (seed, cycle). So which batch
a step sees depends on nothing but (seed, step): the whole state is one integer, on any number of hosts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from data_pipeline.loader import Loader, Rows

MAX_CYCLE = 10_000  # steps; longer cycles mean proportions that were meant to be simpler


@dataclasses.dataclass(frozen=True)
class Stream:
    """One part of a mixture.

    Attributes:
      name: such as "512 t2i", for logs.
      loader: its samples and layout.
      weight: batches of it in every cycle.
    """

    name: str
    loader: Loader
    weight: int


class Turn(NamedTuple):
    """Whose turn a step is: the number of the stream, and which batch of it."""

    stream: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Streams that take turns.

    Raises:
      ValueError: without streams, for a weight below 1, or a cycle above `MAX_CYCLE` steps.
    """

    streams: tuple[Stream, ...]
    seed: int = 0

    def __post_init__(self):
        weights = [stream.weight for stream in self.streams]
        if not weights or min(weights) < 1 or sum(weights) > MAX_CYCLE:
            raise ValueError(f"weights {weights} must be at least 1 each and at most {MAX_CYCLE} together")

    @property
    def cycle(self) -> int:
        """Steps after which every stream has had exactly its weight of batches."""
        return sum(stream.weight for stream in self.streams)

    def turn(self, step: int) -> Turn:
        """Whose turn step 0, 1, ... is."""
        cycle, place = divmod(step, self.cycle)
        order = self._order(cycle)
        stream = int(order[place])
        return Turn(stream, cycle * self.streams[stream].weight + int(np.count_nonzero(order[:place] == stream)))

    def from_step(self, start: int) -> Iterator[tuple[Stream, Rows]]:
        """Batches of steps start, start + 1, ... with their streams; reading runs ahead in threads."""
        batches = [stream.loader.batches() for stream in self.streams]

        def batch(step: int) -> tuple[Stream, Rows]:
            stream, index = self.turn(step)
            return self.streams[stream], batches[stream][index]

        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def _order(self, cycle: int) -> np.ndarray:
        return _draw(tuple(stream.weight for stream in self.streams), self.seed, cycle)


@functools.lru_cache(maxsize=64)
def _draw(weights: Sequence[int], seed: int, cycle: int) -> np.ndarray:
    order = np.repeat(np.arange(len(weights)), weights)
    return np.random.default_rng((seed, cycle)).permutation(order)
