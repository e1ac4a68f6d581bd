"""Mean and standard deviation of latents are those of the whole data set, however it is split and whatever happened."""

import dataclasses
import functools
import json
import operator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.buckets import Bucket
from qi2_jax import sharding
from qi2_jax.config.changes import is_changeable
from qi2_jax.inference import encoders
from qi2_jax.inference.encoders import ImageEncoder
from qi2_jax.models.vae import VAE
from qi2_jax.pixels import normalize
from qi2_jax.runs import paths
from qi2_jax.tasks.autoencoder import latent_statistics, task
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.tasks.autoencoder.latent_statistics import Moments
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment
from tests.tasks.autoencoder.test_task import images, tiny  # noqa: F401


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_any_split_has_the_moments_of_the_whole(sizes, offset, seed):
    if not sum(sizes):
        assert functools.reduce(operator.add, [Moments.none(3)] * 2).count == 0
        return
    whole = np.random.default_rng(seed).normal(offset, (0.1, 1, 5), (sum(sizes), 3))
    parts = [Moments.of(part) for part in np.split(whole, np.cumsum(sizes)[:-1]) if len(part)]
    found = functools.reduce(operator.add, [*parts, Moments.none(3)])
    assert found.count == len(whole)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.std, np.maximum(whole.std(0), latent_statistics.SMALLEST_STD), rtol=1e-10)


@pytest.fixture(scope="module")
def chosen(images):  # noqa: F811
    """Seven images, of which three are in another bucket."""
    sizes = [Bucket(32, 64) if number in (0, 3, 5) else Bucket(64, 64) for number in range(7)]
    chosen = (dataclasses.replace(image, bucket=size) for image, size in zip(images.chosen, sizes, strict=False))
    return dataclasses.replace(images, chosen=tuple(chosen))


@pytest.fixture(scope="module")
def vae():
    return VAE(tiny().model, key=jax.random.key(0))


def latents_of(vae, chosen):
    """The latents of all images, each encoded by itself."""
    return np.concatenate([np.asarray(vae.encode(normalize(image[None])).mean).reshape(-1, 8) for image in chosen])


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 2), (4, 4), (2, 8)])
def test_statistics_do_not_depend_on_batches_devices_and_processes(vae, chosen, devices, batch_size, monkeypatch):
    expected = latents_of(vae, chosen).astype(np.float64)
    mesh = sharding.make_mesh(sharding.MeshShape(data=devices), jax.devices()[:devices])
    encoder = ImageEncoder(vae, mesh, np.float32, batch_size)
    shares = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(latent_statistics._measure(encoder, chosen))
    found = functools.reduce(operator.add, shares)
    assert found.count == len(expected)  # rows that fill up a batch do not count
    np.testing.assert_allclose(found.mean, expected.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.std, expected.std(0), rtol=1e-6)


def test_crops_are_measured_together(vae):
    batches = [np.random.default_rng(seed).uniform(-1, 1, (2, 8, 6, 4)).astype(np.float32) for seed in range(3)]
    latents = np.concatenate([np.asarray(vae.encode(x).mean, np.float64).reshape(-1, 8) for x in batches])
    found = latent_statistics.of_crops(vae, iter(batches))
    np.testing.assert_allclose(found.mean, latents.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.std, latents.std(0), rtol=1e-4)
    constant = Moments.of(np.zeros((5, 8), np.float32))
    np.testing.assert_allclose(constant.std, latent_statistics.SMALLEST_STD)  # its noise is not amplified


def test_an_interrupted_measurement_begins_anew_and_a_finished_one_is_kept(chosen, tmp_path, monkeypatch):
    config, run, model = (
        dataclasses.replace(tiny(), crop=32, statistics_batches=0),
        tmp_path / "run",
        tmp_path / "model",
    )
    small = dataclasses.replace(chosen.chosen[0], index=7, bucket=Bucket(64, 16))  # neither trained on nor measured
    whole = dataclasses.replace(chosen, chosen=(small, *chosen.chosen))
    of_batch, batches = ImageEncoder.latents, []

    def interrupted(self, pixels):
        if batches:
            raise KeyboardInterrupt
        batches.append(pixels)
        return of_batch(self, pixels)

    monkeypatch.setattr(ImageEncoder, "latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        task.train_autoencoder(config, whole, run, model)
    lines = [line for line in metrics.lines(run / metrics.FILE) if "loss" in line]
    assert lines[-1]["step"] == 2 and not (run / latent_statistics.FILE).exists() and not model.exists()
    monkeypatch.setattr(ImageEncoder, "latents", of_batch)
    task.train_autoencoder(config, whole, run, model)
    assert [line for line in metrics.lines(run / metrics.FILE) if "loss" in line] == lines  # nothing is trained again
    stored = json.loads((model / "vae" / "config.json").read_text())
    mesh = task.make_mesh(config.mesh)
    vae = encoders.load(model, "vae", sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
    expected = latents_of(vae, chosen).astype(np.float64)
    np.testing.assert_allclose(stored["latents_mean"], expected.mean(0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(stored["latents_std"], expected.std(0), rtol=1e-6)

    monkeypatch.setattr(ImageEncoder, "latents", interrupted)
    trained = contents.weights(run / paths.CHECKPOINTS / "2", "ema")
    kept = latent_statistics.of_images(config.model, trained, chosen, 7, mesh, run)
    assert list(kept.mean) == stored["latents_mean"] and list(kept.std) == stored["latents_std"]
    raw = contents.weights(run / paths.CHECKPOINTS / "2", "model")
    for weights, count in ((trained, 4), (raw, 0)):  # other images, and other weights
        with pytest.raises(KeyboardInterrupt):
            latent_statistics.of_images(config.model, weights, chosen, count, mesh, run)


def test_a_config_names_crops_or_images():
    with pytest.raises(ValueError, match="statistics_batches is 1 and statistics_images 5"):
        dataclasses.replace(tiny(), statistics_images=5)
    changed = ["vae.statistics_batches=2", "vae.statistics_images=0"]
    assert load_experiment("experiments/qwen_image_2/autoencoder.py:tiny", changed).vae.statistics_batches == 2
    for key in ("statistics_batches", "statistics_images"):  # of runs that exist, too
        assert is_changeable(AutoencoderConfig, key)
