"""Streams that take turns in exact proportions: a pure function of (seed, turn), so the whole state is one integer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_CYCLE = 10_000  # turns; a longer cycle suggests proportions that were meant to be simpler


class Turn(NamedTuple):
    """A turn: index of the stream, and number of its earlier turns."""

    stream: int
    batch: int


@dataclass(frozen=True)
class Turns:
    """An endless sequence of turns. In every cycle, each stream has as many turns as its weight, in a random order.

    Attributes:
      weights: turns of each stream in a cycle.
      seed: seed of the order within the cycles.

    Raises:
      ValueError: if there are no streams, a weight is below 1, or a cycle has more than `MAX_CYCLE` turns.
    """

    weights: tuple[int, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 1 or sum(self.weights) > MAX_CYCLE:
            raise ValueError(f"weights {[*self.weights]} must be at least 1 each and at most {MAX_CYCLE} together")

    @property
    def cycle(self) -> int:
        """Number of turns in a cycle."""
        return sum(self.weights)

    def turn(self, number: int) -> Turn:
        """The stream of turn 0, 1, ..., and how many turns it had before."""
        if len(self.weights) == 1:
            return Turn(0, number)
        cycle, place = divmod(number, self.cycle)
        order = self.order(cycle)
        stream = int(order[place])
        return Turn(stream, cycle * self.weights[stream] + int(np.count_nonzero(order[:place] == stream)))

    def order(self, cycle: int) -> np.ndarray:
        """The streams of the turns of a cycle."""
        return _draw_order(self.weights, self.seed, cycle)


@functools.lru_cache(maxsize=64)
def _draw_order(weights: Sequence[int], seed: int, cycle: int) -> np.ndarray:
    order = np.repeat(np.arange(len(weights)), weights)
    return np.random.default_rng((seed, cycle)).permutation(order)
