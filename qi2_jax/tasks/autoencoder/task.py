"""Training the autoencoder on crops of images."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from data_pipeline.loading.crops import Crops, Pictures
from qi2_jax import sharding
from qi2_jax.interop import weights
from qi2_jax.models.vae import VAE
from qi2_jax.runs import model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.tasks import stages
from qi2_jax.tasks.autoencoder import objective as vae_training
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig
from qi2_jax.training import loop
from qi2_jax.training.checkpoints import manager
from qi2_jax.training.reader import Feed, Update

MAX_HELD_BYTES = 1 << 30


def train_vae(
    config: AutoencoderConfig,
    pictures: Pictures,
    out: pathlib.Path,
    model: pathlib.Path,
    *,
    accept_changes: bool = False,
) -> None:
    """Trains the autoencoder and puts its EMA weights, with latent statistics, into the model folder.

    Args:
      accept_changes: see `loop.train`.
    """
    if (model / "vae" / f"{weights.STEM}.safetensors").is_file():
        return
    mesh = stages.make_mesh(config.mesh)
    # Every picture is cropped again and again: where there is room, decoded once.
    smallest = min(min(picture.bucket.width, picture.bucket.height) for picture in pictures.chosen)
    if not 0 < config.crop <= smallest:
        raise ValueError(f"vae.crop is {config.crop}; it must fit every bucket, whose shortest side is {smallest}")
    held = list(pictures) if pictures.nbytes <= MAX_HELD_BYTES else pictures
    rows = sharding.own_rows(mesh, config.batch_size)
    crops = Crops(held, config.crop, config.batch_size, config.seed, rows)

    def feed(pixels: Any) -> Feed:
        return Feed(None, pixels, config.batch_size, {})

    def updates(start: int) -> Iterator[Update]:
        return (Update([feed(pixels)], config.batch_size) for pixels in crops.from_step(start))

    task = loop.Task(
        "autoencoder",
        lambda key: VAE(config.model, key=key),
        vae_training.make_loss(config.loss),
        updates,
        lambda: [feed(next(crops.from_step(0)))],
        {"pictures": pictures.digest},
        ema_ramp=config.ema_ramp,
    )
    # Not `train.steps`: an end that was brought forward may lie behind.
    step = int(loop.train(task, config, out, mesh, accept_changes=accept_changes).step)
    with processes.agreed():
        if jax.process_index() == 0:
            trained = manager.weights(out / paths.CHECKPOINTS / str(step), "ema")
            vae = weights.load(trained, jax.eval_shape(lambda: VAE(config.model, key=jax.random.key(0))))
            fresh = dataclasses.replace(crops, rows=None).from_step(config.train.steps)
            crops_of_all = itertools.islice(fresh, config.statistics_batches)
            model_folder.save_vae(model, vae, *vae_training.latent_statistics(vae, crops_of_all))
