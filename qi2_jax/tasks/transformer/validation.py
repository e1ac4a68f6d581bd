"""Validation of the transformer: losses on held-out samples at fixed noise and timesteps.

Dims: `B` batch, `Q` quantiles.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from data_pipeline.loading.batch import Batch, collate, with_text
from data_pipeline.loading.mixture import Stream
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import TimestepDistribution
from qi2_jax.runtime import compiler
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.batches import Inputs
from qi2_jax.tasks.transformer.objective import Objective
from qi2_jax.training.microbatch import Microbatch, Stats, put

AHEAD = 4  # unfinished losses on the devices while the next is dispatched
QUANTILES = tuple(np.linspace(0.1, 0.9, 9).tolist())


class HeldOut(NamedTuple):
    """Held-out samples of a stream.

    Attributes:
      microbatches: batches on the mesh.
      images: number of samples. Further rows only fill the last batch.
    """

    microbatches: Sequence[Microbatch]
    images: int


def make_validation(
    timesteps: TimestepDistribution, objective: Objective, seed: int, quantiles: tuple[float, ...] = QUANTILES
) -> Callable[..., Float[np.ndarray, "Q"]]:
    """Makes a function that computes mean losses at fixed noise and timesteps, whatever the training step drew.

    Args:
      timesteps: timestep distribution of the training.
      objective: objective of the training.
      seed: seed of the noise.
      quantiles: probabilities in (0, 1). The timesteps are the quantiles of `timesteps` at them, shifted as in
        training.

    Returns:
      `(model, frozen, held_out, check_signals) -> losses`, the mean loss at each quantile. Noise depends on (seed,
      index of the image, quantile), not on the size of the batches. `check_signals` is called before each batch and may
      raise to end the validation.
    """
    times = np.asarray(timesteps.quantile(jnp.asarray(quantiles)))

    @compiler.jit(static_argnums=2)
    def loss_at(
        model: Any,
        frozen: Any,
        layout: Layout,
        batch: Batch,
        time: Float[Array, ""],
        key: Key[Array, ""],
        first: Int[Array, ""],
        images: Int[Array, ""],
    ) -> Float[Array, ""]:
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
        held_out: HeldOut,
        check_signals: Callable[[], None] = lambda: None,
    ) -> Float[np.ndarray, "Q"]:
        keys, losses, first = jax.random.split(jax.random.key(seed), len(quantiles)), [], 0
        running = InFlight(AHEAD)
        for layout, batch, *_ in held_out.microbatches:
            check_signals()
            for key, time in zip(keys, times, strict=True):
                place = np.int32(first), np.int32(held_out.images)
                losses.append(loss_at(model, frozen, layout, batch, time, key, *place))
                running.add(losses[-1])
            first += batch.latents_BNC.shape[0]
        return np.sum(np.reshape(jax.device_get(losses), (-1, len(quantiles))), axis=0) / held_out.images

    return validate


def held_out_batches(stream: Stream, most: int, mesh: Mesh, inputs: Inputs) -> HeldOut:
    """The first `most` held-out samples of a stream, on the mesh."""
    loader, count = stream.loader, min(most, len(stream.held_out))
    size = min(loader.size, sharding.padded_size(mesh, count))
    microbatches = []
    for start in range(0, count, size):
        samples = [stream.held_out[(start + row) % count] for row in sharding.local_rows(mesh, size)]
        batch = collate(loader.layout, [with_text(sample, sample.texts[0]) for sample in samples])
        batch = inputs.complete_on_host(loader.layout, batch)
        microbatches.append(put(mesh, Microbatch(loader.layout, batch, stats=Stats(size))))
    return HeldOut(microbatches, count)


def report(
    of_ema: Mapping[str, Float[np.ndarray, "Q"]], of_raw: Mapping[str, Float[np.ndarray, "Q"]]
) -> dict[str, float]:
    """Validation metrics from the losses at each quantile, by stream, of the EMA and of the raw weights.

    `validation_loss` is a plain mean over streams and quantiles of the EMA.
    """
    by_quantile = np.mean(list(of_ema.values()), axis=0)
    return {
        "validation_loss": float(by_quantile.mean()),
        **{f"validation_loss/ema/{name}": float(losses.mean()) for name, losses in of_ema.items()},
        **{f"validation_loss/raw/{name}": float(losses.mean()) for name, losses in of_raw.items()},
        **{f"validation_loss/ema_t/{place:02d}": float(loss) for place, loss in enumerate(by_quantile)},
        **{
            f"validation_loss/{kind}_t/{name}/{place:02d}": float(loss)
            for kind, found in (("ema", of_ema), ("raw", of_raw))
            for name, losses in found.items()
            for place, loss in enumerate(losses)
        },
    }
