"""Tiles give what the whole image gives: in pixels, at seams, and for every position of a window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qi2_jax import sharding
from qi2_jax.inference import tiling
from qi2_jax.inference.encoders import ImageEncoder
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


def test_only_large_images_are_computed_in_tiles(vae, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (3, 120, 72, 3), dtype=np.uint8)
    encoder = ImageEncoder(vae, sharding.make_mesh(sharding.MeshShape(data=2), jax.devices()[:2]), jnp.float32, 2)
    tiled, results = [], []

    def in_tiles(compute, *arguments, **options):
        tiled.append(compute.__name__)
        return compute(*arguments, **options, tile=16)

    for name in ("encode_in_tiles", "decode_in_tiles"):
        monkeypatch.setattr(tiling, name, functools.partial(in_tiles, getattr(tiling, name)))
    for limit in (120 * 72, 120 * 72 - 1):
        monkeypatch.setattr(tiling, "MAX_ENCODED_WHOLE", limit)
        monkeypatch.setattr(tiling, "MAX_DECODED_WHOLE", limit)
        latents = np.stack(encoder.latents(list(images)))
        results.append((latents, tiling.decode(vae, latents[:1], jnp.float32)))
        assert tiled == ([] if limit == 120 * 72 else ["encode_in_tiles"] * 2 + ["decode_in_tiles"])
    for whole, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, whole, atol=1e-5, rtol=0)


def test_windows_that_see_less_give_other_pixels(vae, monkeypatch):
    images = noise(120, 120)
    latents = np.asarray(encode_images(vae, images, jnp.float32))
    whole = np.asarray(decode_latents(vae, latents, jnp.float32))
    reach, margins = tiling.encoder_reach(CONFIG), tiling.decoder_margins(CONFIG)
    monkeypatch.setattr(tiling, "encoder_reach", lambda config: reach // 2)
    assert np.abs(tiling.encode_in_tiles(vae, images, jnp.float32, tile=16) - latents).max() > 1e-4
    for place in (0, 2):
        narrower = tuple(margin - (level >= place) for level, margin in enumerate(margins))
        monkeypatch.setattr(tiling, "decoder_margins", lambda config, narrower=narrower: narrower)
        assert np.abs(tiling.decode_in_tiles(vae, latents, jnp.float32, tile=16) - whole).max() > 1e-6


def test_tiles_of_a_model_on_patches_equal_the_whole_image():
    config = VAEConfig(8, 8, 4, (1, 1), 1, (False,), in_channels=3, out_channels=3, patch_size=2)
    assert tiling.decoder_margins(config) == (7, 5, 1)  # latents, patches, patches
    model = trained(config)
    images = noise(80, 64)
    latents = np.asarray(encode_images(model, images, jnp.float32))
    found = tiling.encode_in_tiles(model, images, jnp.float32, tile=16)
    np.testing.assert_allclose(found, latents, atol=1e-5 * np.abs(latents).max(), rtol=0)
    decoded = tiling.decode_in_tiles(model, latents, jnp.float32, tile=16)
    np.testing.assert_allclose(decoded, decode_latents(model, latents, jnp.float32), atol=1e-5, rtol=0)


def test_reach_of_the_published_model():
    assert tiling.encoder_reach(VAEConfig()) == 9
    assert tiling.decoder_margins(VAEConfig()) == (13, 13, 12, 10, 7, 1)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 40))
def test_trimmed_windows_hold_their_tiles_and_what_these_see(length, tile):
    config, tile, end, sizes = VAEConfig(), min(tile, length), 0, set()
    scales, margins = (1, 2, 4, 8, 16, 16, 16), (*tiling.decoder_margins(config), 0)
    for begin in tiling._begins(length, tile):
        assert begin <= end <= begin + tile <= length
        end, start, last_scale, previous = begin + tile, 0, 1, length
        window, trims = tiling._trims(config, begin, tile, length)
        for scale, margin, trim in zip(scales, margins, (window, *trims), strict=True):
            factor, last_scale = scale // last_scale, scale
            assert trim.start >= 0 and trim.start + trim.size <= previous * factor  # a part of the level's result
            start, previous = start * factor + trim.start, trim.size
            assert start <= max(0, begin * scale - margin)
            assert start + trim.size >= min(length, begin + tile) * scale + min(margin, (length - end) * scale)
        assert (start, previous) == (begin * 16, tile * 16)
        sizes.add((window.size, *(trim.size for trim in trims)))
    assert end == length and len(sizes) == 1  # one program


def test_sizes_off_the_grid_are_refused(vae):
    with pytest.raises(ValueError, match=r"30 x 32 pixels; resize both to multiples of 4"):
        tiling.encode_in_tiles(vae, noise(30, 32), jnp.float32)
    with pytest.raises(ValueError, match=r"tile is 10 pixels; it must be a positive multiple of 4"):
        tiling.decode_in_tiles(vae, np.zeros((1, 4, 4, 4), np.float32), jnp.float32, tile=10)
