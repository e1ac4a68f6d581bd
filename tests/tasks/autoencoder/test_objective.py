"""The autoencoder's loss and the statistics of its latents."""

import jax
import numpy as np
import pytest

from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.tasks.autoencoder import objective as training


@pytest.fixture(scope="module")
def vae():
    return VAE(VAEConfig(4, 4, 8, (1, 1), 1, (True,), in_channels=3, out_channels=3), key=jax.random.key(0))


def pixels(seed, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 8, 6, 3)).astype(np.float32)


def test_loss_is_the_mean_error_of_the_decoded_mode(vae):
    x = pixels(0)
    error = np.asarray(vae.decode(vae.encode(x).mean, clamp=False)) - x
    for kind, expected in (("absolute", np.abs(error).mean()), ("squared", np.square(error).mean())):
        value, scalars = training.make_loss(kind)(vae, None, None, x, jax.random.split(jax.random.key(0), 2))
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert float(scalars["psnr"]) == pytest.approx(10 * np.log10(4 / np.square(error).mean()), rel=1e-4)
    with pytest.raises(ValueError, match=r"'hinge' .* choose one of \['absolute', 'squared'\]"):
        training.make_loss("hinge")


def test_statistics_are_those_of_all_latents_together(vae):
    batches = [pixels(seed) for seed in range(3)]
    latents = np.concatenate([np.asarray(vae.encode(x).mean).reshape(-1, 8) for x in batches])
    mean, std = training.latent_statistics(vae, iter(batches))
    np.testing.assert_allclose(mean, latents.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, latents.std(0), rtol=1e-4)


def test_channel_that_does_not_vary_is_not_amplified(vae):
    _, std = training.latent_statistics(vae, [np.zeros((1, 2, 2, 3), np.float32)], floor=0.01)
    np.testing.assert_allclose(std, 0.01)
