"""A linear start gives the error of principal components before the first update, and only where that is possible."""

import dataclasses

import jax
import numpy as np
import pytest

from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.models.vae_blocks import to_patches
from qi2_jax.tasks.autoencoder import linear_start

CONFIG = VAEConfig(20, 18, 8, (1,), 1, (), in_channels=3, out_channels=3, patch_size=4)


def images(seed):
    """Smooth noise: patches with many components of different size."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(4, 6, 6, 3))
    x = np.linspace(0, np.pi, 32)
    basis = np.cos(np.arange(6)[:, None] * x)
    smooth = np.einsum("buvc,uy,vx->byxc", waves, basis, basis)
    return np.clip(smooth / 8 + 0.1 * rng.normal(size=smooth.shape), -1, 1).astype(np.float32)


def error_of_principal_components(batches, count):
    patches = np.concatenate([np.asarray(to_patches(batch, 4)).reshape(-1, 48) for batch in batches])
    centered = patches - patches.mean(axis=0)
    return (
        np.linalg.svd(centered, compute_uv=False)[count:]
        @ np.linalg.svd(centered, compute_uv=False)[count:]
        / (centered.size)
    )


def test_a_fresh_model_is_the_linear_code():
    batches = [images(seed) for seed in range(4)]
    vae = VAE(CONFIG, key=jax.random.key(0))
    random = np.mean([np.square(vae.decode(vae.encode(x).mean, clamp=False) - x) for x in batches])
    linear_start.start_linear(vae, batches)
    latents = np.concatenate([np.asarray(vae.encode(batch).mean).reshape(-1, 8) for batch in batches])
    found = np.mean([np.square(vae.decode(vae.encode(x).mean, clamp=False) - x) for x in batches])
    best = error_of_principal_components(batches, 8)
    assert found < best < 0.1 * random  # the decoder also sees the neighbours
    assert 0.9 < latents.var(axis=0).mean() < 1.1 and latents.var(axis=0).min() > 0.2  # no channel is idle
    assert np.all(np.asarray(vae.encode(batches[0]).logvar) == linear_start.LOGVAR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(multipliers=(1, 1), halves_time=(False,)), "2 levels"),
        (dict(encoder_width=16), "16 and 18 channels"),
        (dict(patch_size=1), "3 values in a patch"),
    ],
)
def test_models_without_such_weights_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_start.check(dataclasses.replace(CONFIG, **change))


def test_images_of_one_colour_give_finite_weights():
    vae = VAE(CONFIG, key=jax.random.key(0))
    grey = np.full((2, 8, 8, 3), 0.25, np.float32)
    linear_start.start_linear(vae, [grey])
    np.testing.assert_allclose(vae.decode(vae.encode(grey).mean), grey, atol=1e-3)
