"""Mixtures: batches of several streams (areas, tasks) in exact proportions, a pure function of the turn.

All batches of a stream have one size and few layouts, so a step runs few compiled programs. The streams take turns.
The number of turns in a cycle is the sum of the weights; their order is drawn from (seed, cycle). The batch of a turn
therefore depends on (seed, turn) alone: the whole state is one integer, on any number of hosts. A batch that is too
large for the devices is read as several microbatches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from data_pipeline.loading.loader import Loader
from data_pipeline.loading.text_slots import MIN_GAIN, TextSlots, choose_layouts
from data_pipeline.loading.turns import Turn, Turns
from data_pipeline.samples.cache import Cache, CachedStream, Largest, StreamKey
from data_pipeline.samples.schema import Sample
from qi2_jax.sequence import Layout
from qi2_jax.training.microbatch import Microbatch


@dataclasses.dataclass(frozen=True)
class Stream:
    """One part of a mixture.

    Attributes:
      name: name in logs, such as "512-1".
      loader: loader of microbatches.
      weight: number of its batches in every cycle.
      held_out: samples for validation and sample grids, which fit the loader's largest layout.
    """

    name: str
    loader: Loader
    weight: int
    held_out: Sequence[Sample] = ()

    @property
    def microbatches(self) -> int:
        """Number of microbatches in a batch."""
        return self.loader.microbatches


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Streams that take turns.

    Raises:
      ValueError: if there are no streams, a weight is below 1, or a cycle has more than `MAX_CYCLE` turns.
    """

    streams: tuple[Stream, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self._turns

    @classmethod
    def of_cache(
        cls,
        cache: Cache,
        shares: "Shares",
        microbatches: Callable[[StreamKey, Layout], tuple[int, int]],
        *,
        seed: int,
        dropout: float,
        local_rows: Callable[[int], Sequence[int]],
        slots: TextSlots = TextSlots(),  # noqa: B008
    ) -> "Mixture":
        """The streams of a cache that have a share.

        Args:
          cache: encoded samples.
          shares: shares of areas and tasks.
          microbatches: function from a stream and its largest layout to the number of microbatches in a batch and the
            global size of each.
          seed: seed of the order and of the loaders.
          dropout: probability of the empty prompt, see `Loader`.
          local_rows: function from the size of a microbatch to the rows that this process reads.
          slots: how batches are formed by the lengths of texts.

        Raises:
          ValueError: if a stream with a share has no samples, or none held out although the cache holds some out.
        """
        streams, weights = [], shares.weights()
        for position, (key, (stream, held_out)) in enumerate(streams_of(cache, shares).items()):
            layout = layout_of(stream.largest | held_out.largest, cache.empty.lengths)
            count, size = microbatches(key, layout)
            layouts = choose_layouts(
                layout, stream.lengths, cache.empty.lengths, dropout, slots.layouts, min_gain(weights, key)
            )
            labels = {"batch/side": float(key.side), "batch/conditions": float(key.conditions)}
            rows = local_rows(size)
            loader = Loader(
                samples=stream,
                lengths=stream.lengths,
                empty=cache.empty,
                layouts=layouts,
                size=size,
                seed=seed + 2 * position,
                dropout=dropout,
                rows=rows,
                labels=labels,
                slots=slots,
                microbatches=count,
            )
            streams.append(Stream(str(key), loader, weights[key], held_out))
        return cls(tuple(streams), seed)

    @property
    def cycle(self) -> int:
        """Number of turns in a cycle, in which every stream has as many batches as its weight."""
        return self._turns.cycle

    def turn(self, number: int) -> Turn:
        """The stream and batch of turn 0, 1, ..."""
        return self._turns.turn(number)

    def count_microbatches(self, start: int, turns: int) -> int:
        """Number of microbatches in turns start, ..., start + turns - 1."""
        return sum(self.streams[self.turn(turn).stream].microbatches for turn in range(start, start + turns))

    def from_turn(self, start: int) -> Iterator[Microbatch]:
        """The microbatches of turns start, start + 1, ...; threads read them ahead."""
        batches = [stream.loader.batches() for stream in self.streams]
        counts = np.array([stream.microbatches for stream in self.streams])
        in_cycle = sum(stream.weight * stream.microbatches for stream in self.streams)

        def microbatch(number: int) -> Microbatch:
            cycle, place = divmod(number, in_cycle)
            ends = np.cumsum(counts[self._order(cycle)])
            turn = int(np.searchsorted(ends, place, side="right"))
            stream, batch = self.turn(cycle * self.cycle + turn)
            count = counts[stream]
            return batches[stream][int(batch * count + place - (ends[turn] - count))]

        cycle, place = divmod(start, self.cycle)
        first = cycle * in_cycle + int(counts[self._order(cycle)[:place]].sum())
        numbers = grain.MapDataset.range(first, np.iinfo(np.int64).max).map(microbatch)
        return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def unused(self, cache: Cache) -> dict[str, int]:
        """Number of training samples that the mixture does not read, by stream of the cache."""
        names, training = {stream.name for stream in self.streams}, (s for s in cache.streams if not s.key.held)
        return {str(stream.key): len(stream) for stream in training if str(stream.key) not in names}

    def _order(self, cycle: int) -> np.ndarray:
        return self._turns.order(cycle)

    @functools.cached_property
    def _turns(self) -> Turns:
        return Turns(tuple(stream.weight for stream in self.streams), self.seed)


@dataclasses.dataclass(frozen=True)
class Shares:
    """The shares of areas and tasks in the turns.

    Attributes:
      sides: sides in pixels of the squares that give the areas.
      side_shares: share of each side; 0 for none.
      task_shares: shares of text-to-image and of edits within each side.
      condition_shares: shares of edits with one, two, ... condition images.

    Raises:
      ValueError: if the number of shares is wrong, one is negative, or all are 0.
    """

    sides: tuple[int, ...]
    side_shares: tuple[int, ...]
    task_shares: tuple[int, int]
    condition_shares: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.side_shares) != len(self.sides):
            raise ValueError(f"mixture.sides {self.side_shares} needs a share for each of data.sides {self.sides}")
        if len(self.task_shares) != 2:
            raise ValueError(f"mixture.tasks {self.task_shares} needs two shares: one for pairs and one for edits")
        shares = (*self.side_shares, *self.task_shares, *self.condition_shares)
        if min(shares) < 0 or not any(self.side_shares) or not any(self.task_shares):
            raise ValueError(f"mixture has a negative share, or only shares of 0: {self}")
        if self.task_shares[1] and not any(self.condition_shares):
            raise ValueError("mixture.tasks has edits, but data.mixture.conditions has no share for them")

    def weights(self) -> dict[StreamKey, int]:
        """Number of batches of each stream in a cycle, divided by their greatest common divisor."""
        edits = sum(self.condition_shares) or 1
        tasks = {0: self.task_shares[0] * edits}
        tasks |= {count: self.task_shares[1] * share for count, share in enumerate(self.condition_shares, start=1)}
        weights = {
            StreamKey(side, conditions): share * weight
            for side, share in zip(self.sides, self.side_shares, strict=True)
            for conditions, weight in tasks.items()
            if share * weight
        }
        divisor = math.gcd(*weights.values())
        return {key: weight // divisor for key, weight in weights.items()}


def streams_of(cache: Cache, shares: Shares) -> dict[StreamKey, tuple[CachedStream, CachedStream]]:
    """The streams of a cache that have a share, in the order of `Shares.weights`, each with its held-out stream.

    If the cache holds nothing out, the held-out stream is the stream itself.

    Raises:
      ValueError: if one of them has no samples, or none held out although the cache holds some out.
    """
    by_key = {stream.key: stream for stream in cache.streams}
    if missing := [str(key) for key in shares.weights() if key not in by_key]:
        raise ValueError(
            f"{cache.folder} has no samples for the streams {missing} (side-conditions), only for "
            f"{[str(key) for key in by_key]}; set their share in data.mixture to 0, or select and encode such records"
        )
    if not cache.held_out:
        return {key: (by_key[key], by_key[key]) for key in shares.weights()}
    held = {key: key._replace(held=True) for key in shares.weights()}
    if missing := [str(key) for key in held.values() if key not in by_key]:
        raise ValueError(
            f"{cache.folder} has no validation samples for the streams {missing}, although data.held_out is "
            f"{cache.held_out}. Set their share in data.mixture to 0, add such records, or encode all stages again "
            "with a larger data.held_out, or with 0 to validate on the training samples"
        )
    return {key: (by_key[key], by_key[held_key]) for key, held_key in held.items()}


def min_gain(weights: Mapping[StreamKey, int], key: StreamKey) -> float:
    """Share of a stream's slots that each of its layouts must save.

    A program for a stream that seldom has its turn must save more. The root lies between the same share for all streams
    and one that is as much larger as the stream is rarer.
    """
    return MIN_GAIN * math.sqrt(max(weights.values()) / weights[key])


def layout_of(largest: Largest, empty: Sequence[int]) -> Layout:
    """The smallest layout for every sample of a stream, and for the empty prompt if it may replace their texts."""
    text = tuple(map(max, largest.text, empty)) if not largest.conditions else largest.text
    return Layout(text, largest.target, largest.conditions)
