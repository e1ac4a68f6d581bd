"""The sampler against a plain loop over the model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qi2_jax.diffusion.sampler import Prompt, sample
from qi2_jax.models.mmdit import Conditioning, MMDiT, MMDiTConfig
from qi2_jax.sequence import Layout, place

CONFIG = MMDiTConfig(1, 2, 8, 2, latent_channels=4, text_width=6, rope_dims=(4, 2, 2))
GRIDS = [(2, 3), (1, 2)]  # rows and columns of each image
TIMES = np.float32([[1.0, 0.9], [0.6, 0.5], [0.25, 0.2], [0.0, 0.0]])  # [steps + 1, B]


@pytest.fixture(scope="module")
def model():
    """A model with random weights everywhere, because a freshly initialised one predicts zero."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: MMDiT(CONFIG, key=jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) * 0.4, like)


def prompt(seed, lengths, slots):
    layout = Layout((slots,), 6)
    placed = [place(layout, [length], grid) for length, grid in zip(lengths, GRIDS, strict=True)]
    text = np.random.default_rng(seed).normal(size=(2, slots, CONFIG.text_width)).astype(np.float32)
    positions, valid = (np.stack(parts) for parts in zip(*placed, strict=True))
    return Prompt(layout, Conditioning(text, positions, valid))


PROMPT, NEGATIVE = prompt(0, (3, 4), 4), prompt(1, (2, 1), 2)
NOISE = np.random.default_rng(2).normal(size=(2, 6, CONFIG.latent_channels)).astype(np.float32)
run_model = jax.jit(MMDiT.__call__, static_argnums=1)


def reference(model, times, negative=None, guidance=1.0):
    x = NOISE
    for t, after in itertools.pairwise(times):
        velocity = np.asarray(run_model(model, PROMPT.layout, x, t, PROMPT.cond))
        if negative is not None:
            other = np.asarray(run_model(model, negative.layout, x, t, negative.cond))
            velocity = other + guidance * (velocity - other)
        x = x - (t - after)[:, None, None] * velocity
    return x


def valid_rows(x):
    return [np.asarray(row)[: h * w] for row, (h, w) in zip(x, GRIDS, strict=True)]


def assert_close(got, want):
    for a, b in zip(valid_rows(got), valid_rows(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache_prefix", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_steps_of_a_batch_with_its_own_times(model, cache_prefix, guidance):
    negative = NEGATIVE if guidance > 1 else None
    got = sample(model, NOISE, TIMES, PROMPT, negative=NEGATIVE, guidance=guidance, cache_prefix=cache_prefix)
    assert got.dtype == jnp.float32
    want = reference(model, TIMES, negative, guidance)
    assert_close(got, want)
    assert np.abs(want - NOISE).max() > 0.5
    if negative is not None:
        assert np.abs(want - reference(model, TIMES)).max() > 0.1


def test_times_may_be_the_same_for_all_images(model):
    got = sample(model, NOISE, TIMES[:, 0], PROMPT)
    assert_close(got, reference(model, np.repeat(TIMES[:, :1], 2, axis=1)))


def test_progress_sees_every_step(model):
    seen = []
    sample(model, NOISE, TIMES, PROMPT, progress=lambda steps: (seen.append(step) or step for step in steps))
    assert seen == [0, 1, 2]
