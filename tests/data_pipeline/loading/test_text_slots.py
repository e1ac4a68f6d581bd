"""A stream gets the layouts that waste the fewest slots."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.text_slots import MIN_GAIN, MULTIPLE, TextSlots, choose_layouts, smallest
from data_pipeline.samples.lengths import TextLengths
from qi2_jax.sequence import Layout

EMPTY = (6,)


def of_lengths(texts: list[int]) -> TextLengths:
    return TextLengths(np.ones(len(texts), np.int32), np.array(texts, np.int32)[:, None])


def mean_slots(layouts, texts) -> float:
    return float(np.mean([smallest(layouts, np.array([[text]])).length for text in texts]))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_layouts_waste_the_fewest_slots_of_all_choices(texts, most):
    largest = Layout((max(*texts, *EMPTY),), target=64)
    layouts = choose_layouts(largest, of_lengths(texts), EMPTY, 0.0, most)
    assert layouts[-1] == largest and len(layouts) <= most
    ends = [layout.text[0] for layout in layouts]
    assert ends == sorted(set(ends)) and all(end % MULTIPLE == 0 or end == largest.text[0] for end in ends)
    assert ends[0] >= EMPTY[0]
    steps = [step for step in range(MULTIPLE, largest.text[0], MULTIPLE)]
    few = [choice for choice in itertools.combinations(steps, len(layouts) - 1)]
    padded = [max(text, EMPTY[0]) for text in texts]
    best = min(mean_slots([*(Layout((end,), 64) for end in choice), largest], padded) for choice in few)
    assert mean_slots(layouts, padded) == pytest.approx(best)


def test_a_layout_that_saves_little_is_left_out():
    texts = [40] * 999 + [1000]
    layouts = choose_layouts(Layout((1000,), 4096), of_lengths(texts), EMPTY, 0.0, 8)
    assert [layout.text[0] for layout in layouts] == [48, 1000]
    large = choose_layouts(Layout((1000,), 200_000), of_lengths(texts), EMPTY, 0.0, 8)
    assert [layout.text[0] for layout in large] == [1000] and MIN_GAIN > 960 / 201_000


def test_dropout_and_several_texts_count_as_often_as_they_are_drawn():
    tokens = np.array([[20], [500], [500], [500]], np.int32)
    lengths = TextLengths(np.array([3, 1], np.int32), tokens)  # the first text is drawn in a sixth of the rows
    layouts = choose_layouts(Layout((500,), 16), lengths, EMPTY, 0.5, 2)
    assert [layout.text[0] for layout in layouts] == [32, 500]
    assert [layout.text[0] for layout in choose_layouts(Layout((500,), 16), lengths, EMPTY, 0.99, 2)] == [16, 500]


def test_edits_take_their_own_empty_prompt_and_keep_the_other_segments():
    tokens = np.array([[9, 100], [8, 30], [7, 200], [9, 30]], np.int32)  # two edits, each with a text and an empty one
    lengths = TextLengths(np.array([2, 2], np.int32), tokens)
    layouts = choose_layouts(Layout((9, 200), 64, (64,)), lengths, EMPTY, 0.5, 3)
    assert [layout.text for layout in layouts] == [(9, 32), (9, 112), (9, 200)]
    drawn = lengths.drawn(np.array([0, 1, 1]), np.zeros(3, int), np.array([False, False, True]), EMPTY)
    assert drawn.tolist() == [[9, 100], [7, 200], [9, 30]]


@pytest.mark.parametrize("name", ["layouts", "window", "pieces"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        TextSlots(**{name: 0})
