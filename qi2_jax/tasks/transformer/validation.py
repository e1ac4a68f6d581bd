"""Validation of the transformer: losses at fixed noise and times on held-out samples."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from data_pipeline.loading.loader import Row, collate
from data_pipeline.loading.mixture import Stream
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import TimestepLaw
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer import objective as training
from qi2_jax.tasks.transformer.batches import Inputs
from qi2_jax.tasks.transformer.objective import AHEAD, Batch, Objective

QUANTILES = tuple(np.linspace(0.1, 0.9, 9).tolist())


def make_validation(
    law: TimestepLaw, objective: Objective, seed: int, quantiles: tuple[float, ...] = QUANTILES
) -> Callable[..., Float[np.ndarray, "Q"]]:
    """Mean losses over held noise and times: the same for every call, whatever the training step drew.

    Args:
      law: of the times in training.
      objective: as in training.
      seed: of the noise.
      quantiles: shares of the law, whose quantiles are the times.

    Returns:
      `(model, frozen, batches, images, before_each) -> losses`, one for each quantile of the law, which is shifted as
      in training; means over the first `images` rows of all batches, those after them only fill the last batch. Noise
      depends on (seed, place of the image among all, quantile), not on the size of the batches. `before_each` is called
      before each batch; what it raises ends the validation.
    """
    times = np.asarray(law.quantile(jnp.asarray(quantiles)))

    @functools.partial(jax.jit, static_argnums=2)
    def loss_at(model, frozen, layout, batch, time, key, first, images):
        places_B = first + jnp.arange(batch.latents_BNC.shape[0])
        keys_B = jax.vmap(lambda place: jax.random.fold_in(key, place))(places_B)
        losses_B, _ = objective.losses(
            model,
            frozen,
            layout,
            batch,
            lambda tokens_B: jnp.full(tokens_B.shape, time),
            lambda shape: jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys_B),
        )
        return jnp.sum(jnp.where(places_B < images, losses_B, 0))

    def validate(
        model: Any,
        frozen: Any,
        batches: Iterable[tuple[Layout, Batch]],
        images: int,
        before_each: Callable[[], None] = lambda: None,
    ) -> Float[np.ndarray, "Q"]:
        keys, losses, first = jax.random.split(jax.random.key(seed), len(quantiles)), [], 0
        running = InFlight(AHEAD)
        for layout, batch in batches:
            before_each()
            for key, time in zip(keys, times, strict=True):
                place = np.int32(first), np.int32(images)
                losses.append(loss_at(model, frozen, layout, batch, time, key, *place))
                running.add(losses[-1])
            first += batch.latents_BNC.shape[0]
        return np.sum(np.reshape(jax.device_get(losses), (-1, len(quantiles))), axis=0) / images

    return validate


def held_out_batches(
    stream: Stream, most: int, mesh: Mesh, inputs: Inputs
) -> tuple[list[tuple[Layout, training.Batch]], int]:
    """The first held samples of a stream on the mesh, and how many they are; further rows fill the last batch."""
    loader, count = stream.loader, min(most, len(stream.held))
    parts = sharding.batch_parts(mesh)
    size = min(loader.batch_size, -(-count // parts) * parts)
    batches = []
    for start in range(0, count, size):
        samples = (stream.held[(start + row) % count] for row in sharding.own_rows(mesh, size))
        rows = collate(loader.layout, [Row(sample, sample.texts[0]) for sample in samples])
        batches.append((loader.layout, sharding.put_batch(mesh, inputs.to_batch(loader.layout, rows), size)))
    return batches, count
