"""The noise of an image depends on the seed, its place and its size, never on the batch."""

import jax
import numpy as np

from qi2_jax.diffusion.noise import initial_noise

C = 4


def test_noise_of_an_image_is_the_same_in_every_batch():
    tokens = [24, 40, 16, 24]
    together = initial_noise(3, tokens, 40, C)
    for place, count in enumerate(tokens):
        (alone,) = initial_noise(3 + place, [count], count, C)
        np.testing.assert_array_equal(together[place, :count], alone)
        assert not together[place, count:].any()
    assert np.abs(together[0, :16] - together[3, :16]).max() > 0.5


def test_the_first_image_keeps_the_noise_of_earlier_versions():
    before = jax.random.normal(jax.random.key(5), (3, 40, C))
    np.testing.assert_array_equal(initial_noise(5, [24, 40], 40, C)[0, :24], before[0, :24])


def test_seeds_wrap_around():
    last, first = initial_noise((1 << 32) - 1, [8, 8], 8, C)
    np.testing.assert_array_equal(first, initial_noise(0, [8], 8, C)[0])
    assert np.abs(last - first).max() > 0.5
