"""The path between data and noise, and its loss."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qi2_jax.diffusion.flow import interpolate, loss_per_image

B, N, C = 3, 6, 4
COUNTS = (6, 2, 5)  # valid tokens of each image


def draw(seed):
    return np.random.default_rng(seed).normal(size=(B, N, C)).astype(np.float32)


def test_parity_of_the_path():
    """The forward process of the published scheduler."""
    data, noise = draw(0), draw(1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[[0, 300, 999]]
    want = scheduler.scale_noise(torch.from_numpy(data), t, torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(interpolate(data, noise, t.numpy() / 1000), want, rtol=1e-6, atol=1e-6)


def test_the_path_ends_at_data_and_noise():
    data, noise = draw(0), draw(1)
    np.testing.assert_array_equal(interpolate(data, noise, np.zeros(B, np.float32)), data)
    np.testing.assert_array_equal(interpolate(data, noise, np.ones(B, np.float32)), noise)


def test_parity_of_the_loss_over_valid_tokens():
    velocity, data, noise = draw(0), draw(1), draw(2)
    valid = np.arange(N) < np.array(COUNTS)[:, None]
    for array in (velocity, data, noise):
        array[~valid] = 1e4  # arbitrary values at padding
    got = loss_per_image(velocity, data, noise, valid)
    want = [
        torch.nn.functional.mse_loss(*(torch.from_numpy(x[i, :count]) for x in (velocity, noise - data)))
        for i, count in enumerate(COUNTS)
    ]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_loss_is_computed_in_fp32():
    """In bf16, the squares of small errors would be lost next to large values."""
    data, noise = jnp.full((1, 1, 1), 0.0, jnp.bfloat16), jnp.full((1, 1, 1), 256.0, jnp.bfloat16)
    velocity = jnp.full((1, 1, 1), 257.5, jnp.float32)
    assert loss_per_image(velocity, data, noise, np.ones((1, 1), bool)) == np.float32(1.5**2)


def test_an_image_of_padding_alone_costs_nothing():
    valid = np.zeros((B, N), bool)
    np.testing.assert_array_equal(loss_per_image(draw(0), draw(1), draw(2), valid), np.zeros(B))
