"""The autoencoder's loss."""

import jax
import numpy as np
import pytest

from qi2_jax import sharding
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.models.vae import VAE, Posterior, VAEConfig
from qi2_jax.pixels import normalize
from qi2_jax.tasks.autoencoder import objective as training
from qi2_jax.tasks.autoencoder.config import PerceptualConfig
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Crop, Objective
from qi2_jax.tasks.autoencoder.validation import HeldOut, make_validation


@pytest.fixture(scope="module")
def vae():
    return VAE(VAEConfig(4, 4, 8, (1, 1), 1, (True,), in_channels=3, out_channels=3), key=jax.random.key(0))


def pixels(seed, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 8, 6, 3)).astype(np.float32)


def keys(batch=2):
    return jax.random.split(jax.random.key(0), batch)


def test_loss_is_the_mean_error_of_the_decoded_mode(vae):
    x = pixels(0)
    error = np.asarray(vae.decode(vae.encode(x).mean, clamp=False)) - x
    for kind, expected in (("absolute", np.abs(error).mean()), ("squared", np.square(error).mean())):
        value, scalars = Objective(kind).loss(vae, Networks(), None, Crop(x), keys())
        assert float(value) == pytest.approx(expected, rel=1e-5)
        seen = np.square(np.clip(x + error, -1, 1) - x).mean()
        assert float(scalars["psnr"]) == pytest.approx(10 * np.log10(4 / seen), rel=1e-4)
        assert scalars.keys() == {"psnr"}


def test_psnr_is_that_of_what_a_viewer_sees():
    """Alpha is not a colour: an opaque image scores the same with it, and invisible pixels do not count."""
    x, noise = pixels(0), pixels(1) / 4
    opaque = np.ones((*x.shape[:3], 1), np.float32)
    rgb, rgba = (training._psnr(x + noise, x), training._psnr(np.c_[x + noise, opaque], np.c_[x, opaque]))
    assert float(rgb) == pytest.approx(float(rgba), rel=1e-5)
    half = opaque.copy()
    half[:, :4] = -1
    visible = training._psnr(np.clip(x + noise, -1, 1)[:, 4:], x[:, 4:])
    found = training._psnr(np.c_[x + noise, half], np.c_[x, half])
    assert float(found) == pytest.approx(float(visible) + 10 * np.log10(2), rel=1e-5)


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(LPIPSConfig((2, 2, 2, 2, 2)), key=jax.random.key(1))


def test_lpips_counts_with_its_weight_and_is_a_metric(vae, lpips):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 18, 3)).astype(np.float32)
    objective = Objective("absolute", PerceptualConfig(0.5, "weights"))
    value, scalars = objective.loss(vae, Networks(lpips), None, Crop(x), keys())
    rebuilt = training.reconstruct(vae, x)
    distance = float(np.mean(lpips(rebuilt, x)))
    assert float(scalars["lpips"]) == pytest.approx(distance, rel=1e-5) and distance > 0
    assert float(value) == pytest.approx(float(np.abs(rebuilt - x).mean()) + 0.5 * distance, rel=1e-5)


def test_networks_see_transparent_images_over_a_matte():
    rng = np.random.default_rng(0)
    rgb, alpha = rng.uniform(-1, 1, (2, 3, 4, 3)), rng.uniform(0, 1, (2, 3, 4, 1))
    images = np.concatenate([rgb, 2 * alpha - 1], axis=-1).astype(np.float32)
    matte = np.float32([0.25, -1.0])
    expected = alpha * rgb + (1 - alpha) * matte[:, None, None, None]
    np.testing.assert_allclose(training.over_matte(images, matte), expected, atol=1e-6)
    np.testing.assert_array_equal(training.over_matte(images[..., :3], matte), images[..., :3])
    invisible = images.copy()
    invisible[..., 3] = -1
    np.testing.assert_allclose(training.over_matte(invisible, matte)[0], 0.25)


def test_the_matte_of_an_image_depends_on_its_key_alone(lpips):
    vae = VAE(VAEConfig(4, 4, 8, (1, 1), 1, (True,)), key=jax.random.key(0))
    x = np.repeat(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 4)).astype(np.float32), 2, axis=0)
    objective = Objective("absolute", PerceptualConfig(0.5, "weights"))

    def distance(keys_B):
        return float(objective.loss(vae, Networks(lpips), None, Crop(x[: len(keys_B)]), keys_B)[1]["lpips"])

    one, other = distance(keys()[:1]), distance(keys()[1:])
    assert one != pytest.approx(other, rel=1e-3)
    assert distance(keys()) == pytest.approx((one + other) / 2, rel=1e-5)


def test_kl_counts_with_its_weight_and_training_then_decodes_samples(vae):
    x = pixels(0)
    mean, logvar = (np.asarray(part, np.float64) for part in vae.encode(x))
    divergence = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).sum() / x.size
    _, scalars = Objective("absolute", kl=0.1).loss(vae, Networks(), None, Crop(x), keys())
    _, of_mode = Objective("absolute").loss(vae, Networks(), None, Crop(x), keys())
    assert float(scalars["kl"]) == pytest.approx(divergence, rel=1e-5)
    assert float(scalars["psnr"]) != float(of_mode["psnr"])
    narrow = Posterior(vae.encode(x).mean, np.full_like(logvar, -30.0))
    np.testing.assert_allclose(training._sampled(narrow, keys()), narrow.mean, atol=1e-5)
    wide = Posterior(np.zeros((64, 8, 8, 4), np.float32), np.full((64, 8, 8, 4), np.log(4.0), np.float32))
    assert np.std(training._sampled(wide, keys(64))) == pytest.approx(2.0, rel=0.02)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    crops = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    plain, _ = Objective("absolute").loss(vae, Networks(), None, Crop(normalize(crops)), keys())
    held_out = HeldOut([crops], batch_size=2, kinds=["", ""])
    losses = make_validation(Objective("absolute", kl=0.1), mesh)(vae, Networks(), held_out)["loss"]
    assert losses.mean() == pytest.approx(float(plain), rel=1e-5)


def test_rows_of_a_crop_are_shared_by_devices_without_another_result(vae, lpips):
    """Convolutions see across the borders of the parts; every device holds its rows alone."""
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 18, 3)).astype(np.float32)
    parts = []

    def constrain(images, names):
        shared = sharding.Constrain(mesh)(images, names)
        jax.debug.inspect_array_sharding(shared, callback=lambda found: parts.append(found.shard_shape(images.shape)))
        return shared

    def gradients(**options):
        objective = Objective("absolute", PerceptualConfig(0.5, "weights"), **options)
        loss = jax.jit(jax.value_and_grad(lambda vae: objective.loss(vae, Networks(lpips), None, Crop(x), keys())[0]))
        return loss(vae)

    mesh = sharding.make_mesh(sharding.MeshShape(data=2, tensor=4), jax.devices()[:8])
    value, gradient = gradients(constrain=constrain)
    expected, whole = gradients()
    assert parts and set(parts) == {(1, 8, 18, 3)}
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
