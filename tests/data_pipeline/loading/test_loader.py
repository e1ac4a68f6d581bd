"""The loader is a pure function of (seed, step), whatever the number of hosts."""

import concurrent.futures
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.batch import collate, with_text
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.mixture import Mixture, Stream
from data_pipeline.loading.text_slots import TextSlots
from data_pipeline.samples.lengths import TextLengths
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.sequence import Layout
from qi2_jax.training.mean import Mean

LAYOUT = Layout(text=(5,), target=12)
EMPTY = Text(np.full((2, 3), -1, np.float32), (2,))


def make(index: int) -> Sample:
    """A sample whose values are its index."""
    tokens = 3 + index % 3
    latents = np.full(((2, 6), (6, 2), (3, 3))[index % 3] + (4,), index, np.float32)
    return Sample(latents, (Text(np.full((tokens, 3), index, np.float32), (tokens,)),))


def drawn(loader: Loader, start: int, steps: int) -> list[list[tuple[int, int]]]:
    """(sample, text) of each row of a few batches."""
    batches = itertools.islice(Mixture((Stream("only", loader, 1),)).from_turn(start), steps)
    return [
        [(int(a[0, 0]), int(b[0, 0])) for a, b in zip(x.batch.latents_BNC, x.batch.cond.text_BTE, strict=True)]
        for x in batches
    ]


def loader(count: int, batch: int, seed: int = 0, **kwargs) -> Loader:
    samples = [make(index) for index in range(count)]
    return Loader(samples, TextLengths.of(samples), EMPTY, kwargs.pop("layouts", (LAYOUT,)), batch, seed, **kwargs)


@given(st.integers(1, 9), st.sampled_from([8, 16]), st.integers(0, 5), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_global_batches_do_not_depend_on_hosts_or_on_where_reading_starts(count, batch, seed, start):
    expected = drawn(loader(count, batch, seed, dropout=0.3), 0, start + 3)[start:]
    for hosts in (1, 2, 4, 8):
        parts = [
            drawn(loader(count, batch, seed, dropout=0.3, rows=range(host, batch, hosts)), start, 3)
            for host in range(hosts)
        ]
        for step, rows in enumerate(zip(*parts, strict=True)):
            assert [rows[row % hosts][row // hosts] for row in range(batch)] == expected[step]


LAYOUTS = tuple(Layout(text=(slots,), target=12) for slots in (3, 4, 5))


def sorted_loader(batch: int, microbatches: int, hosts: int = 1, host: int = 0, dropout: float = 0.2) -> Loader:
    rows, slots = range(host, batch // microbatches, hosts), TextSlots(3, window=4, pieces=2)
    kwargs = dict(rows=rows, slots=slots, microbatches=microbatches, layouts=LAYOUTS)
    return loader(40, batch // microbatches, 3, dropout=dropout, **kwargs)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_batches_sorted_by_length_do_not_depend_on_microbatches_hosts_or_the_start(microbatches, hosts, start):
    expected = [sorted(rows) for rows in drawn(sorted_loader(8, 1), 0, start + 5)[start:]]
    parts = [drawn(sorted_loader(8, microbatches, hosts, host), start, 5 * microbatches) for host in range(hosts)]
    for step, batch in enumerate(expected):
        read = [part[step * microbatches + place] for part in parts for place in range(microbatches)]
        assert sorted(itertools.chain(*read)) == batch


def test_sorted_batches_have_few_slots_every_sample_once_and_only_known_layouts():
    loaded = sorted_loader(8, 2, dropout=0.0)
    read = list(itertools.islice(loaded.batches(), 40))  # four epochs of 40 samples
    for batch in read:
        used = int(batch.batch.cond.valid_BS[:, : batch.layout.prefix].sum(axis=1).max())
        assert batch.layout in LAYOUTS and used == batch.layout.text[0] and batch.stats.slots == 4 * batch.layout.length
    seen = [int(value) for batch in read for value in batch.batch.latents_BNC[:, 0, 0]]
    for window in range(0, 160, 32):  # a window of four batches has the samples that it would have without sorting
        order = loaded.order()
        assert sorted(seen[window : window + 32]) == sorted(order[place] % 40 for place in range(window, window + 32))
    slots = np.mean([batch.layout.length for batch in read])
    unsorted = [max(3 + order[place] % 3 for place in range(start, start + 4)) for start in range(0, 160, 4)]
    assert slots < 12 + np.mean(unsorted)
    of_batches = {tuple(batch.layout.text[0] for batch in read[start : start + 2]) for start in range(0, 40, 2)}
    assert any(first != second for first, second in of_batches)  # pieces mix lengths within a batch


def test_examples_have_the_shapes_of_their_layouts():
    loaded = sorted_loader(8, 2)
    shapes = {batch.layout: batch.batch.cond.text_BTE.shape for batch in itertools.islice(loaded.batches(), 40)}
    assert {layout: loaded.example(layout).batch.cond.text_BTE.shape for layout in LAYOUTS} == shapes


def test_a_batch_that_cannot_be_cut_into_pieces_is_refused():
    with pytest.raises(ValueError, match="a batch of 8 samples cannot be cut into 3 pieces"):
        loader(40, 8, slots=TextSlots(pieces=3))


def test_every_sample_is_seen_once_per_epoch_and_orders_differ():
    rows = list(itertools.chain(*drawn(loader(7, 4), 0, 14)))
    epochs = [[sample for sample, _ in rows[start : start + 7]] for start in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_dropout_takes_the_empty_prompt_at_its_rate():
    rows = list(itertools.chain(*drawn(loader(8, 8, dropout=0.25), 0, 50)))
    assert all(text in (sample, -1) for sample, text in rows)
    assert 0.17 < np.mean([text == -1 for _, text in rows]) < 0.33
    assert not any(text == -1 for _, text in itertools.chain(*drawn(loader(8, 8), 0, 50)))


def test_several_texts_of_a_sample_are_drawn_evenly_and_an_edit_drops_to_its_own_empty_prompt():
    def text(value):
        return Text(np.full((2, 3), value, np.float32), (1, 1))

    edit = Sample(
        np.zeros((2, 2, 4), np.float32), tuple(map(text, range(3))), (np.zeros((1, 1, 4), np.float32),), text(9)
    )
    layouts = (Layout((1, 1), 4, (1,)),)
    batches = Loader([edit], TextLengths.of([edit]), EMPTY, layouts, 400, 0, dropout=0.25).batches()
    values, counts = np.unique(batches[0].batch.cond.text_BTE[:, 0, 0], return_counts=True)
    assert values.tolist() == [0, 1, 2, 9] and all(70 < count < 130 for count in counts)
    assert batches[0].stats.metrics["batch/dropped"] == counts[3] / 400


def test_collate_pads_at_the_end_and_marks_it():
    batch = collate(LAYOUT, [make(1), make(2)])
    assert batch.cond.valid_BS.sum(axis=1).tolist() == [4 + 12, 5 + 9]
    assert batch.cond.valid_BS[1].tolist() == [True] * 14 + [False] * 3
    assert batch.latents_BNC[1, :9].min() == 2 and not batch.latents_BNC[1, 9:].any()
    assert batch.cond.text_BTE[0, :4].min() == 1 and not batch.cond.text_BTE[0, 4:].any()
    assert batch.samples == () and batch.prompts is None


def test_a_batch_reports_its_composition():
    samples = [make(1), make(2)]
    lengths, labels = TextLengths.of(samples), {"batch/side": 64.0}
    (batch,) = itertools.islice(Loader(samples, lengths, EMPTY, (LAYOUT,), 2, 0, labels=labels).batches(), 1)
    metrics = dict(batch.stats.metrics)
    assert metrics.pop("batch/padding") == pytest.approx(Mean(4, 34))
    assert metrics.pop("batch/padding_text") == pytest.approx(Mean(1, 10))
    assert metrics == {"batch/dropped": 0.0, "batch/wide": 0.0, "batch/tall": 0.5, "batch/side": 64.0}
    assert (batch.stats.images, batch.stats.slots, batch.layout) == (2, 34, LAYOUT)


def test_condition_images_keep_their_order_and_place():
    layout = Layout(text=(2, 1, 3), conditions=(4, 2), target=4)
    conditions = (np.full((1, 3, 4), 7, np.float32), np.full((2, 1, 4), 8, np.float32))
    text = Text(np.arange(5, dtype=np.float32)[:, None].repeat(3, 1), (1, 1, 3))
    sample = Sample(np.zeros((2, 2, 4), np.float32), (text, text), conditions, text)
    cond = collate(layout, [with_text(sample, text)]).cond
    assert cond.conditions_BMC[0, :, 0].tolist() == [7, 7, 7, 0, 8, 8]
    assert cond.text_BTE[0, :, 0].tolist() == [0, 0, 1, 2, 3, 4]
    assert cond.valid_BS[0].tolist() == [True, False, True, True, True, False, True, True, True] + [True] * 7


def test_each_window_is_drawn_once_and_the_next_one_ahead(monkeypatch):
    drawn, draw = [], Loader.draw
    monkeypatch.setattr(Loader, "draw", lambda self, window: (drawn.append(window), draw(self, window))[1])
    batches = sorted_loader(8, 2).batches()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:  # a window has eight microbatches
        list(threads.map(batches.__getitem__, range(24)))
    assert sorted(drawn)[:3] == [0, 1, 2] and len(drawn) == len(set(drawn)) and max(drawn) <= 3
