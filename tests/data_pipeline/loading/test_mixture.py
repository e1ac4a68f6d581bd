"""Streams take turns in exact proportions, and the whole state is the number of the step."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import Loader
from data_pipeline.loading.mixture import Mixture, Shares, Stream
from data_pipeline.samples.cache import Cache
from data_pipeline.samples.lengths import TextLengths
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.sequence import Layout
from qi2_jax.training.microbatch import Microbatch
from tests.caches import write_cache

EMPTY = Text(np.zeros((1, 2), np.float32), (1,))


def stream(number: int, weight: int, samples: int = 5, batch: int = 4, rows=None, parts: int = 1) -> Stream:
    """A stream of samples whose latents encode the stream and the sample."""
    side = 1 + number
    made = [
        Sample(np.full((1, side, 2), 100 * number + index, np.float32), (Text(np.zeros((1, 2), np.float32), (1,)),))
        for index in range(samples)
    ]
    layouts = (Layout((1,), side),)
    loader = Loader(made, TextLengths.of(made), EMPTY, layouts, batch, seed=number, rows=rows, microbatches=parts)
    return Stream(str(number), loader, weight)


def drawn(mixture: Mixture, start: int, steps: int) -> list[tuple[str, list[int]]]:
    drawn = [rows.batch.latents_BNC[:, 0, 0].astype(int).tolist() for rows in microbatches(mixture, start, steps)]
    return [(str(rows[0] // 100), rows) for rows in drawn]


def microbatches(mixture: Mixture, start: int, steps: int) -> list[Microbatch]:
    return list(itertools.islice(mixture.from_turn(start), steps))


weights = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(weights, st.integers(0, 3), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_turns_keep_exact_proportions_and_miss_no_batch(weights, seed, cycle):
    mixture = Mixture(tuple(stream(number, weight) for number, weight in enumerate(weights)), seed)
    first = cycle * mixture.cycle
    turns = [mixture.turn(step) for step in range(first, first + 2 * mixture.cycle)]
    for number, weight in enumerate(weights):
        mine = [turn.batch for turn in turns if turn.stream == number]
        assert mine == list(range(cycle * weight, (cycle + 2) * weight))
        assert Counter(turn.stream for turn in turns[: mixture.cycle])[number] == weight


@given(weights, st.integers(0, 40), st.sampled_from([1, 2, 4]))
@settings(max_examples=10, deadline=None)
def test_batches_depend_on_the_step_alone_on_any_number_of_hosts(weights, start, hosts):
    def mixture(rows=None):
        return Mixture(tuple(stream(number, weight, rows=rows) for number, weight in enumerate(weights)), 3)

    expected = drawn(mixture(), 0, start + 5)[start:]
    parts = [drawn(mixture(range(host, 4, hosts)), start, 5) for host in range(hosts)]
    for step, (name, rows) in enumerate(expected):
        assert [part[step][0] for part in parts] == [name] * hosts
        assert [parts[row % hosts][step][1][row // hosts] for row in range(4)] == rows
        assert {value // 100 for value in rows} == {int(name)}


@given(weights, st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4), st.integers(0, 40))
@settings(max_examples=10, deadline=None)
def test_a_batch_read_as_microbatches_is_the_same_batch(weights, parts, start):
    whole = Mixture(tuple(stream(number, weight) for number, weight in enumerate(weights)), 3)
    split = Mixture(
        tuple(
            stream(number, weight, batch=4 // parts[number], parts=parts[number])
            for number, weight in enumerate(weights)
        ),
        3,
    )
    found = iter(drawn(split, start, 5 * 4))
    for name, rows in drawn(whole, start, 5):
        read = [next(found) for _ in range(parts[int(name)])]
        assert [own for own, _ in read] == [name] * len(read)
        assert list(itertools.chain(*(own for _, own in read))) == rows


def test_every_sample_of_a_stream_is_drawn_once_per_epoch():
    steps = drawn(Mixture((stream(0, 3), stream(1, 1)), 1), 0, 40)
    for name, samples in (("0", 5), ("1", 5)):
        seen = list(itertools.chain(*(rows for own, rows in steps if own == name)))
        for epoch in range(len(seen) // samples):
            assert len(set(seen[epoch * samples : (epoch + 1) * samples])) == samples


def test_order_changes_from_cycle_to_cycle():
    mixture = Mixture((stream(0, 5), stream(1, 5)), 0)
    orders = {tuple(mixture.turn(10 * cycle + place).stream for place in range(10)) for cycle in range(5)}
    assert len(orders) > 1


def of_cache(folder, held_out: float, held: tuple[int, ...], of_tasks=(1, 0)) -> tuple[Mixture, Cache]:
    """A mixture over six pairs, each longer than the one before, and an edit."""

    def sample(index: int, conditions: int = 0) -> Sample:
        lengths = (1 + index,) * (conditions + 1)
        text = Text(np.zeros((sum(lengths), 2), np.float32), lengths)
        sources = (np.zeros((1, 1, 2), np.float32),) * conditions
        latents = np.full((1, 1 + index, 2), index, np.float32)
        return Sample(latents, (text,), sources, text if conditions else None)

    made = [(64, sample(index), index in held) for index in range(6)] + [(64, sample(6, 1), False)]
    write_cache(folder, made, EMPTY, {"preprocessing": {"held_out": held_out} if held_out else {}})
    cache = Cache(folder)
    shares = Shares((64,), (1,), of_tasks, (1,))
    return Mixture.of_cache(cache, shares, lambda key, layout: (1, 2), seed=0, dropout=0.0, local_rows=range), cache


def test_training_reads_only_samples_that_are_not_held_out(tmp_path):
    mixture, cache = of_cache(tmp_path, 0.5, (1, 5))
    rows = itertools.chain(*(rows for _, rows in drawn(mixture, 0, 20)))
    assert set(rows) == {0, 2, 3, 4}
    (only,) = mixture.streams
    assert [int(sample.latents[0, 0, 0]) for sample in only.held_out] == [1, 5]
    assert (only.loader.layout.target, only.loader.layout.text) == (6, (6,))
    assert mixture.unused(cache) == {"64-1": 1}


def test_where_nothing_is_held_out_validation_reads_the_training_samples(tmp_path):
    mixture, _ = of_cache(tmp_path, 0.0, ())
    assert mixture.streams[0].held_out is mixture.streams[0].loader.samples


def test_a_stream_without_held_out_samples_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"no validation samples for the streams \['64-1-held'\].*larger data\.held_out"
    ):
        of_cache(tmp_path, 0.5, (1, 5), of_tasks=(1, 1))


@pytest.mark.parametrize("weights", [(), (0,), (3, -1), (9_999, 2)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="must be at least 1 each"):
        Mixture(tuple(stream(number, weight) for number, weight in enumerate(weights)))


@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=2).filter(any),
    st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
)
def test_shares_are_exact_for_areas_tasks_and_numbers_of_condition_images(of_sides, of_tasks, of_conditions):
    weights = Shares((256, 512), tuple(of_sides), of_tasks, tuple(of_conditions)).weights()
    total = sum(weights.values())
    for side, share in zip((256, 512), of_sides, strict=True):
        steps = {key.conditions: weight for key, weight in weights.items() if key.side == side}
        assert sum(steps.values()) * sum(of_sides) == share * total
        edits = sum(weight for count, weight in steps.items() if count)
        assert edits * sum(of_tasks) == of_tasks[1] * sum(steps.values())
        for count, part in enumerate(of_conditions, start=1):
            assert steps.get(count, 0) * sum(of_conditions) == part * edits


def test_shares_that_do_not_fit_are_refused():
    for arguments in (((256,), (1, 1), (1, 0), (1,)), ((256,), (0,), (1, 0), (1,)), ((256,), (1,), (0, 1), (0,))):
        with pytest.raises(ValueError, match="mixture"):
            Shares(*arguments)
