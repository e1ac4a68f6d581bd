"""Mixtures: batches of several streams (areas, tasks) in exact proportions, a pure function of the turn.

A stream has batches of one layout and one size, so a step compiles into one of few programs. The streams take turns in
cycles of as many turns as their weights add up to; the order within a cycle is drawn from (seed, cycle). So which batch
a turn sees depends on nothing but (seed, turn): the whole state is one integer, on any number of hosts. A batch that is
too large for the devices is read in parts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from data_pipeline.loading.loader import Loader, Rows
from data_pipeline.samples import cache as cached
from data_pipeline.samples.cache import Cache, Largest, StreamKey
from data_pipeline.samples.schema import Sample
from qi2_jax.sequence import Layout

MAX_CYCLE = 10_000  # steps; longer cycles mean proportions that were meant to be simpler


@dataclasses.dataclass(frozen=True)
class Stream:
    """One part of a mixture.

    Attributes:
      name: such as "512-1", for logs.
      loader: its samples and layout; its batch size is that of a part.
      weight: batches of it in every cycle.
      parts: in which a batch is read.
      held: what validation and pictures read, in the same layout.
    """

    name: str
    loader: Loader
    weight: int
    parts: int = 1
    held: Sequence[Sample] = ()

    @property
    def images(self) -> int:
        """Of a whole batch."""
        return self.loader.batch_size * self.parts


class Turn(NamedTuple):
    """Whose turn it is: the number of the stream, and which batch of it."""

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

    @classmethod
    def of_cache(
        cls,
        cache: Cache,
        shares: "Shares",
        part_sizes: Sequence[tuple[int, int]],
        *,
        seed: int,
        dropout: float,
        own_rows: Callable[[int], Sequence[int]],
    ) -> "Mixture":
        """The streams of a cache that have a share.

        Args:
          part_sizes: for every side the parts of a batch, and the global samples of one part.
          dropout: of texts, see `Loader`.
          own_rows: which rows of a batch of that size this process makes.

        Raises:
          ValueError: if a stream with a share has no samples, or none is held where some are to be.
        """
        streams, weights = [], shares.weights()
        for position, (key, (stream, held)) in enumerate(streams_of(cache, shares).items()):
            parts, size = part_sizes[shares.sides.index(key.side)]
            layout = layout_of(stream.largest | held.largest, cache.empty.lengths)
            loader = Loader(stream, cache.empty, layout, size, seed + 2 * position, dropout, own_rows(size))
            streams.append(Stream(str(key), loader, weights[key], parts, held))
        return cls(tuple(streams), seed)

    @property
    def cycle(self) -> int:
        """Turns after which every stream has had exactly its weight of batches."""
        return sum(stream.weight for stream in self.streams)

    def turn(self, number: int) -> Turn:
        """Whose turn 0, 1, ... it is."""
        cycle, place = divmod(number, self.cycle)
        order = self._order(cycle)
        stream = int(order[place])
        return Turn(stream, cycle * self.streams[stream].weight + int(np.count_nonzero(order[:place] == stream)))

    def from_turn(self, start: int) -> Iterator[tuple[Stream, Rows]]:
        """Parts of the batches of turns start, start + 1, ... with their streams; reading runs ahead in threads."""
        batches = [stream.loader.batches() for stream in self.streams]
        parts = np.array([stream.parts for stream in self.streams])
        in_cycle = sum(stream.weight * stream.parts for stream in self.streams)

        def part(number: int) -> tuple[Stream, Rows]:
            cycle, place = divmod(number, in_cycle)
            ends = np.cumsum(parts[self._order(cycle)])
            turn = int(np.searchsorted(ends, place, side="right"))
            stream, batch = self.turn(cycle * self.cycle + turn)
            own = parts[stream]
            return self.streams[stream], batches[stream][int(batch * own + place - (ends[turn] - own))]

        cycle, place = divmod(start, self.cycle)
        first = cycle * in_cycle + int(parts[self._order(cycle)[:place]].sum())
        numbers = grain.MapDataset.range(first, np.iinfo(np.int64).max).map(part)
        return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def unused(self, cache: Cache) -> dict[str, int]:
        """Samples of the cache that no stream of the mixture reads, though they are not held."""
        names, free = {stream.name for stream in self.streams}, (s for s in cache.streams if not s.key.held)
        return {str(stream.key): len(stream) for stream in free if str(stream.key) not in names}

    def _order(self, cycle: int) -> np.ndarray:
        return _draw(tuple(stream.weight for stream in self.streams), self.seed, cycle)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Which share of the steps each area and task has.

    Attributes:
      sides: of the areas, in pixels.
      of_sides: steps of each side in a cycle; 0: none.
      of_tasks: of these, text-to-image steps and edit steps.
      of_conditions: of edit steps, those with one, with two, ... condition images.

    Raises:
      ValueError: for another number of shares, a negative one, or none at all.
    """

    sides: tuple[int, ...]
    of_sides: tuple[int, ...]
    of_tasks: tuple[int, int]
    of_conditions: tuple[int, ...]

    def __post_init__(self):
        if len(self.of_sides) != len(self.sides):
            raise ValueError(f"mixture.sides {self.of_sides} needs a share for each of data.sides {self.sides}")
        if len(self.of_tasks) != 2:
            raise ValueError(f"mixture.tasks {self.of_tasks} needs two shares: of pairs, and of edits")
        shares = (*self.of_sides, *self.of_tasks, *self.of_conditions)
        if min(shares) < 0 or not any(self.of_sides) or not any(self.of_tasks):
            raise ValueError(f"mixture has negative shares, or none at all: {self}")
        if self.of_tasks[1] and not any(self.of_conditions):
            raise ValueError("mixture.tasks has edits, but data.mixture.conditions has no share for them")

    def weights(self) -> dict[StreamKey, int]:
        """Batches of each stream in a cycle, without a common divisor."""
        edits = sum(self.of_conditions) or 1
        tasks = {0: self.of_tasks[0] * edits}
        tasks |= {count: self.of_tasks[1] * share for count, share in enumerate(self.of_conditions, start=1)}
        found = {
            StreamKey(side, conditions): share * weight
            for side, share in zip(self.sides, self.of_sides, strict=True)
            for conditions, weight in tasks.items()
            if share * weight
        }
        divisor = math.gcd(*found.values())
        return {key: weight // divisor for key, weight in found.items()}


def streams_of(cache: Cache, shares: Shares) -> dict[StreamKey, tuple[cached.Stream, cached.Stream]]:
    """The streams of a cache that have a share, in the order of their weights, each with that of its held samples; that
    is the stream itself where the cache holds nothing out.

    Raises:
      ValueError: if one of them has no samples, or none is held where some are to be.
    """
    found = {stream.key: stream for stream in cache.streams}
    if missing := [str(key) for key in shares.weights() if key not in found]:
        raise ValueError(
            f"{cache.folder} has no samples for {missing} (side-conditions), only {[str(key) for key in found]}; "
            "give these no share in data.mixture, or select and encode such records"
        )
    if not cache.held_out:
        return {key: (found[key], found[key]) for key in shares.weights()}
    held = {key: key._replace(held=True) for key in shares.weights()}
    if missing := [str(key) for key in held.values() if key not in found]:
        raise ValueError(
            f"{cache.folder} has no samples for {missing} to validate with, though data.held_out is {cache.held_out}; "
            "give these no share in data.mixture, bring more such records, or encode all stages again with a larger "
            "data.held_out, or with 0, where validation reads what is trained"
        )
    return {key: (found[key], found[own]) for key, own in held.items()}


def layout_of(largest: Largest, empty: Sequence[int]) -> Layout:
    """The layout that holds every sample of a stream, and the empty prompt where it may take a text's place."""
    text = tuple(map(max, largest.text, empty)) if not largest.conditions else largest.text
    return Layout(text, largest.target, largest.conditions)


@functools.lru_cache(maxsize=64)
def _draw(weights: Sequence[int], seed: int, cycle: int) -> np.ndarray:
    order = np.repeat(np.arange(len(weights)), weights)
    return np.random.default_rng((seed, cycle)).permutation(order)
