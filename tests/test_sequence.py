"""Invariants of the joint sequence for any layout and any sample that fits it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qi2_jax.sequence import (
    Layout,
    join,
    place,
    quarter_turn_by_product,
    quarter_turn_by_shifts,
    rotate,
    rotations,
)

GRID = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def samples(draw, max_images: int = 3):
    """(text lengths, condition grids, target grid, padding of each segment)."""
    images = draw(st.lists(GRID, max_size=max_images))
    lengths = draw(st.lists(st.integers(0, 7), min_size=len(images) + 1, max_size=len(images) + 1))
    padding = draw(st.lists(st.integers(0, 3), min_size=2 * len(images) + 2, max_size=2 * len(images) + 2))
    return lengths, images, draw(GRID), padding


def layout_for(lengths, images, target, padding) -> Layout:
    extra = iter(padding)
    return Layout(
        text=tuple(length + next(extra) for length in lengths),
        conditions=tuple(h * w + next(extra) for h, w in images),
        target=target[0] * target[1] + next(extra),
    )


@given(samples())
@settings(max_examples=200, deadline=None)
def test_padding_never_moves_a_real_token(sample):
    lengths, images, target, padding = sample
    tight = place(layout_for(lengths, images, target, [0] * len(padding)), lengths, target, images)
    padded = place(layout_for(*sample), lengths, target, images)
    assert tight[1].all()
    np.testing.assert_array_equal(padded[0][padded[1]], tight[0])


@given(samples())
@settings(max_examples=200, deadline=None)
def test_visibility_is_causal_between_segments_and_whole_within_images(sample):
    layout = layout_for(*sample)
    until = layout.visible_until()
    for kind, start, end in layout.segments:
        expected = np.arange(start, end) + 1 if kind == "text" else np.full(end - start, end)
        np.testing.assert_array_equal(until[start:end], expected)
    assert until[-1] == layout.length, "the target sees everything"
    assert (until[: layout.prefix] <= layout.prefix).all(), "the prefix never sees the target"
    assert (layout.visible_until("bidirectional") == layout.length).all()


@given(samples())
@settings(max_examples=100, deadline=None)
def test_positions_follow_their_definition(sample):
    """A text token advances all axes; an image is centred and advances by its longer side."""
    lengths, images, target, _ = sample
    layout = layout_for(*sample)
    positions, valid = place(layout, lengths, target, images)
    p, text, grids = 0, iter(lengths), iter([*images, target])
    for kind, start, end in layout.segments:
        real = positions[start:end][valid[start:end]]
        if kind == "text":
            count = next(text)
            assert len(real) == count and (real == np.arange(p, p + count)[:, None]).all()
            p += count
        else:
            h, w = next(grids)
            assert len(real) == h * w and (real[:, 0] == p).all()
            assert set(real[:, 1]) == set(range(-(h - h // 2), h // 2))
            assert set(real[:, 2]) == set(range(-(w - w // 2), w // 2))
            p += max(h, w)


def test_join_puts_segments_in_the_layouts_order():
    layout = Layout(text=(2, 1, 3), conditions=(2, 4), target=3)
    text, conditions, target = (
        jnp.arange(n)[None, :, None] + float(base) for n, base in ((6, 100), (6, 200), (3, 300))
    )
    expected = [100, 101, 200, 201, 102, 202, 203, 204, 205, 103, 104, 105]
    assert join(layout, text, conditions, None).ravel().tolist() == expected
    assert join(layout, text, conditions, target).ravel().tolist() == [*expected, 300, 301, 302]


def test_rotation_depends_on_relative_positions_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 4, 2, 16)), jnp.float32) for _ in range(2))
    positions = rng.integers(-5, 6, (1, 4, 3))

    def scores(shift):
        turn = rotations(jnp.asarray(positions + shift), (4, 6, 6), 1e4)
        return jnp.einsum("bshk,bthk->bhst", rotate(q, turn), rotate(k, turn))

    np.testing.assert_allclose(scores(0), scores(np.array([3, -2, 7])), atol=1e-5)
    assert np.abs(scores(0) - jnp.einsum("bshk,bthk->bhst", q, k)).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_equals_complex_multiplication_and_its_gradient_turns_back(dtype):
    rng = np.random.default_rng(1)
    x, gradient = (jnp.asarray(rng.normal(size=(2, 5, 3, 16)), dtype) for _ in range(2))
    turn = rotations(jnp.asarray(rng.integers(-9, 10, (2, 5, 3))), (4, 6, 6), 1e4)
    y, pullback = jax.vjp(lambda x: rotate(x, turn), x)

    def expected(x, sign):
        pairs = np.asarray(x, np.float64).reshape(2, 5, 3, 8, 2)
        factors = (np.asarray(turn[0]) + sign * 1j * np.asarray(turn[1]))[:, :, None, ::2]
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * factors
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    tolerance = dict(rtol=0, atol=1e-6) if dtype == jnp.float32 else dict(rtol=2**-8, atol=1e-6)
    for result, wanted in ((y, expected(x, 1)), (pullback(gradient)[0], expected(gradient, -1))):
        assert result.dtype == dtype
        np.testing.assert_allclose(np.asarray(result, np.float64), wanted, **tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_quarter_turns_agree_bit_for_bit(dtype):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 3, 16)), dtype)
    by_product, by_shifts = quarter_turn_by_product(x), quarter_turn_by_shifts(x)
    assert by_product.dtype == by_shifts.dtype == jnp.float32
    np.testing.assert_array_equal(by_product, by_shifts)
    np.testing.assert_array_equal(by_shifts[..., 0::2], -x[..., 1::2].astype(jnp.float32))
    np.testing.assert_array_equal(by_shifts[..., 1::2], x[..., 0::2].astype(jnp.float32))


@pytest.mark.parametrize(
    "arguments",
    [dict(text=(1, 2), target=4), dict(text=(1,), target=4, conditions=(2,)), dict(text=(1,), target=0)],
)
def test_layouts_that_cannot_exist_are_refused(arguments):
    with pytest.raises(ValueError):
        Layout(**arguments)


def test_a_sample_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="9 target tokens do not fit in the 8 slots"):
        place(Layout((4,), 8), [4], (3, 3))
    with pytest.raises(ValueError, match="1 text segments and 0 condition images"):
        place(Layout((4,), 8), [4, 2], (2, 2), [(1, 1)])
