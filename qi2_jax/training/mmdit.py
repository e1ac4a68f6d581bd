"""Training the transformer: its batch, its loss, its validation.

Dims: `B` batch, `N` target slots, `C` latent channels.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.diffusion import flow
from qi2_jax.diffusion.timesteps import Shift, TimestepLaw
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT
from qi2_jax.sequence import Layout
from qi2_jax.training.step import Loss


class Batch(NamedTuple):
    """Clean target latents, normalised per channel, and what they are conditioned on."""

    latents_BNC: Float[AnyArray, "B N C"]
    given: Conditioning


def make_loss(law: TimestepLaw, shift: Shift, run: Execution) -> Loss:
    """Flow-matching loss at times drawn from `law` and shifted by each image's own number of tokens."""

    def loss(model: MMDiT, layout: Layout, batch: Batch, key: Array):
        time_key, noise_key = jax.random.split(key)
        valid_BN = batch.given.valid_BS[:, layout.prefix :]
        t_B = shift(law.sample(time_key, valid_BN.shape[0]), jnp.sum(valid_BN, axis=1))
        noise_BNC = jax.random.normal(noise_key, batch.latents_BNC.shape)
        return jnp.mean(_loss_at(model, layout, batch, t_B, noise_BNC, run)), {}

    return loss


def _loss_at(model, layout, batch, t_B, noise_BNC, run):
    x_BNC = flow.interpolate(batch.latents_BNC, noise_BNC, t_B)
    velocity_BNC = compute_copy(model, run.dtype)(layout, x_BNC, t_B, batch.given, run)
    return flow.loss_per_image(velocity_BNC, batch.latents_BNC, noise_BNC, batch.given.valid_BS[:, layout.prefix :])


def compute_copy(model: MMDiT, dtype: Any) -> MMDiT:
    """The blocks' matrices in the compute dtype, so that they are cast before they are gathered, not after."""

    def cast(leaf):
        return leaf.replace(leaf.get_value().astype(dtype)) if len(leaf.get_metadata()["axes"]) > 1 else leaf

    blocks = jax.tree.map(cast, model.blocks, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    copy = jax.tree.map(lambda leaf: leaf, model)
    copy.blocks = blocks
    return copy


QUANTILES = tuple(np.linspace(0.1, 0.9, 9).tolist())


def make_validation(
    shift: Shift, run: Execution, seed: int, quantiles: tuple[float, ...] = QUANTILES
) -> Callable[[MMDiT, Iterable[tuple[Layout, Batch]]], float]:
    """Mean loss over held noise and times: the same for every call, whatever the training step drew.

    Each batch is evaluated at every quantile of t, shifted as in training; noise depends on (seed, batch, quantile).
    """

    @functools.partial(jax.jit, static_argnums=1)
    def loss_at(model, layout, batch, quantile, key):
        tokens_B = jnp.sum(batch.given.valid_BS[:, layout.prefix :], axis=1)
        t_B = shift(jnp.full(tokens_B.shape, quantile), tokens_B)
        return jnp.mean(_loss_at(model, layout, batch, t_B, jax.random.normal(key, batch.latents_BNC.shape), run))

    def validate(model: MMDiT, batches: Iterable[tuple[Layout, Batch]]) -> float:
        key, losses = jax.random.key(seed), []
        for index, (layout, batch) in enumerate(batches):
            for place, quantile in enumerate(quantiles):
                noise_key = jax.random.fold_in(key, index * len(quantiles) + place)
                losses.append(loss_at(model, layout, batch, jnp.float32(quantile), noise_key))
        return float(np.mean(jax.device_get(losses)))

    return validate
