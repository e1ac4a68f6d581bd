"""Tiles give what the whole image gives: in pixels, at seams, and for every position of a window."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qi2_jax.inference import tiling
from qi2_jax.inference.latents import decode_latents, encode_images
from qi2_jax.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(4, 4, 4, (1, 1, 1), 1, (False, True), in_channels=3, out_channels=3)


@pytest.fixture(scope="module")
def vae():
    return trained(CONFIG)


def trained(config):
    """A model in which no layer is zero, as after training."""
    model = VAE(dataclasses.replace(config, latents_mean=(0.1,) * 4, latents_std=(2.0,) * 4), key=jax.random.key(0))
    leaves, form = jax.tree.flatten(model)
    rng = np.random.default_rng(1)
    scaled = [leaf + 0.3 * leaf.size**-0.25 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(form, scaled)


def noise(height, width):
    return np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(120, 72), (40, 136), (16, 16)])
def test_tiles_equal_the_whole_image(vae, size):
    images = noise(*size)
    latents = np.asarray(encode_images(vae, images, jnp.float32))
    found = tiling.encode_in_tiles(vae, images, jnp.float32, tile=16)
    np.testing.assert_allclose(found, latents, atol=1e-5 * np.abs(latents).max(), rtol=0)
    expected = np.asarray(decode_latents(vae, latents, jnp.float32))
    assert expected.std() > 0.1 and np.abs(latents).std() > 0.01
    decoded = tiling.decode_in_tiles(vae, latents, jnp.float32, tile=16)
    assert decoded.shape == expected.shape
    np.testing.assert_allclose(decoded, expected, atol=1e-5, rtol=0)


def test_windows_that_see_less_give_other_pixels(vae, monkeypatch):
    images = noise(120, 120)
    latents = np.asarray(encode_images(vae, images, jnp.float32))
    whole = np.asarray(decode_latents(vae, latents, jnp.float32))
    for name, compute, expected in (
        ("encoder_reach", lambda: tiling.encode_in_tiles(vae, images, jnp.float32, tile=16), latents),
        ("decoder_reach", lambda: tiling.decode_in_tiles(vae, latents, jnp.float32, tile=16), whole),
    ):
        reach = getattr(tiling, name)
        monkeypatch.setattr(tiling, name, lambda config, reach=reach: reach(config) // 2)
        assert np.abs(compute() - expected).max() > 1e-4


def test_tiles_of_a_model_on_patches_equal_the_whole_image():
    config = VAEConfig(8, 8, 4, (1, 1), 1, (False,), in_channels=3, out_channels=3, patch_size=2)
    assert tiling.decoder_reach(config) == 7  # 4 latents, then 2 * 4 + 1 + 4 + 1 patches of half that size
    model = trained(config)
    images = noise(80, 64)
    latents = np.asarray(encode_images(model, images, jnp.float32))
    found = tiling.encode_in_tiles(model, images, jnp.float32, tile=16)
    np.testing.assert_allclose(found, latents, atol=1e-5 * np.abs(latents).max(), rtol=0)
    decoded = tiling.decode_in_tiles(model, latents, jnp.float32, tile=16)
    np.testing.assert_allclose(decoded, decode_latents(model, latents, jnp.float32), atol=1e-5, rtol=0)


def test_reach_of_the_published_model():
    assert (tiling.encoder_reach(VAEConfig()), tiling.decoder_reach(VAEConfig())) == (9, 13)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 20))
def test_windows_hold_their_tiles_and_what_these_see(length, tile, reach):
    size, end = min(length, tile + 2 * reach), 0
    for begin, stop, first in tiling._windows(length, tile, reach):
        assert begin == end < stop and 0 <= first <= length - size
        assert first <= max(0, begin - reach) and first + size >= min(length, stop + reach)
        end = stop
    assert end == length


def test_sizes_off_the_grid_are_refused(vae):
    with pytest.raises(ValueError, match=r"30 x 32 pixels; resize both to multiples of 4"):
        tiling.encode_in_tiles(vae, noise(30, 32), jnp.float32)
    with pytest.raises(ValueError, match=r"tile is 10 pixels; it must be a positive multiple of 4"):
        tiling.decode_in_tiles(vae, np.zeros((1, 4, 4, 4), np.float32), jnp.float32, tile=10)
