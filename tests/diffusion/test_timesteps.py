"""Timestep distributions and the shift."""

import math

import jax
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from qi2_jax.diffusion.timesteps import TIMESTEP_DISTRIBUTIONS, LogitNormal, Shift, Uniform

T = np.linspace(0.01, 1, 37, dtype=np.float32)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_parity_of_the_dynamic_shift(kind):
    shift = Shift(base_shift=1.5, max_shift=2.5, kind=kind)
    for tokens, mu in [(256, 1.5), (8192, 2.5), (4224, 2.0), (16128, 3.5)]:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        np.testing.assert_allclose(shift(T, tokens), scheduler.time_shift(mu, 1.0, T), rtol=2e-6)


def test_the_static_shift_ignores_the_resolution():
    shift = Shift(dynamic=False, shift=3.0)
    np.testing.assert_allclose(shift(T, 256), 3 * T / (1 + 2 * T), rtol=1e-6)
    np.testing.assert_array_equal(shift(T, 256), shift(T, 8192))


def test_the_shift_in_training_is_the_shift_in_sampling():
    """Training shifts arrays inside a compiled step, with one time and one number of tokens per image."""
    shift, t_B, tokens_B = Shift(), T[:5], np.array([24, 256, 1024, 4096, 16384], np.int32)
    got = jax.jit(shift)(t_B, tokens_B)
    want = [shift(float(t), int(tokens)) for t, tokens in zip(t_B, tokens_B, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_larger_images_get_more_noise():
    shift = Shift()
    assert shift.strength(256) == pytest.approx(math.exp(0.5)) and shift.strength(8192) == pytest.approx(math.exp(0.9))
    small, large = shift(T, 256), shift(T, 8192)
    assert np.all(large[:-1] > small[:-1]) and np.all(small[:-1] > T[:-1])
    assert small[-1] == large[-1] == 1


def test_the_logit_normal_timestep_distribution():
    t = np.asarray(LogitNormal(mean=-0.4, std=1.5).sample(jax.random.split(jax.random.key(0), 20_000)))
    assert np.all((t > 0) & (t < 1))
    logits = np.log(t / (1 - t))
    assert abs(logits.mean() + 0.4) < 0.04 and abs(logits.std() - 1.5) < 0.04
    assert abs(np.mean(np.abs(logits + 0.4) < 1.5) - 0.6827) < 0.01  # share of a normal within one standard deviation


def test_the_uniform_timestep_distribution():
    t = np.asarray(Uniform(0.2, 0.7).sample(jax.random.split(jax.random.key(0), 20_000)))
    assert t.min() >= 0.2 and t.max() < 0.7
    counts, _ = np.histogram(t, 10, (0.2, 0.7))
    assert np.abs(counts / 2000 - 1).max() < 0.1


@pytest.mark.parametrize(
    "distribution",
    [*(make() for make in TIMESTEP_DISTRIBUTIONS.values()), LogitNormal(mean=-0.8, std=1.7), Uniform(0.2, 0.7)],
    ids=str,
)
def test_quantiles_of_a_timestep_distribution_are_those_of_what_it_draws(distribution):
    q = np.linspace(0.05, 0.95, 19, dtype=np.float32)
    t = np.asarray(distribution.sample(jax.random.split(jax.random.key(0), 40_000)))
    of_q = np.asarray(distribution.quantile(q))
    assert np.all(np.diff(of_q) > 0)
    shares = np.mean(t[:, None] < of_q, axis=0)
    np.testing.assert_allclose(shares, q, atol=0.01)  # four standard deviations of the empirical share


@pytest.mark.parametrize("name", TIMESTEP_DISTRIBUTIONS)
def test_laws_depend_on_the_key_alone(name):
    distribution = TIMESTEP_DISTRIBUTIONS[name]()
    first = distribution.sample(jax.random.split(jax.random.key(1), 8))
    assert first.shape == (8,)
    np.testing.assert_array_equal(first, distribution.sample(jax.random.split(jax.random.key(1), 8)))
    assert not np.array_equal(first, distribution.sample(jax.random.split(jax.random.key(2), 8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormal(std=0.0), "std 0.0; std must be above 0"),
        (lambda: LogitNormal(mean=math.nan), "mean nan"),
        (lambda: Uniform(0.7, 0.2), "low 0.7 and high 0.2"),
        (lambda: Uniform(-0.1, 0.2), "low -0.1"),
        (lambda: Shift(base_tokens=8192), "base_tokens 8192 must be below max_tokens 8192"),
        (lambda: Shift(max_shift=math.inf), "max_shift is inf"),
        (lambda: Shift(base_shift="x"), "base_shift is 'x'"),
        (lambda: Shift(dynamic=False, shift=0.0), "shift is 0.0; it must be above 0"),
        (lambda: Shift(dynamic="no"), "dynamic is 'no'"),
    ],
)
def test_values_that_make_no_times_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_kind_of_shift_is_refused():
    with pytest.raises(ValueError, match="'cubic' is unknown; choose 'exponential' or 'linear'"):
        Shift(kind="cubic")
