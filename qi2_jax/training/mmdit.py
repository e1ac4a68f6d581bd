"""Training the transformer: its batch, its loss, its validation.

Dims: `B` batch, `N` target slots, `C` latent channels, `Q` quantiles.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from qi2_jax.diffusion import flow
from qi2_jax.diffusion.timesteps import Shift, TimestepLaw
from qi2_jax.in_flight import InFlight
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT
from qi2_jax.sequence import Layout
from qi2_jax.training.step import Loss


class Batch(NamedTuple):
    """Clean target latents, normalised per channel, and what they are conditioned on.

    `prompts` is what text features are computed from, where `given` has none yet.
    """

    latents_BNC: Float[AnyArray, "B N C"]
    given: Conditioning
    prompts: Any = None


# (frozen, trained) -> the model that predicts: what is trained may be a part of it.
Assemble = Callable[[Any, Any], MMDiT]
# (frozen, layout, batch) -> the batch with everything in it, where something is computed on the mesh.
Complete = Callable[[Any, Layout, Batch], Batch]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is predicted how, in training and validation alike.

    Attributes:
      shift: of times with resolution.
      run: how the model runs.
      assemble, complete: see the types; by default what is trained is the model, and batches are complete.
    """

    shift: Shift
    run: Execution
    assemble: Assemble = lambda frozen, model: model
    complete: Complete = lambda frozen, layout, batch: batch

    def losses(
        self,
        model: Any,
        frozen: Any,
        layout: Layout,
        batch: Batch,
        time: Callable[[Float[Array, "B"]], Float[Array, "B"]],
        noise: Callable[[tuple[int, ...]], Float[Array, "B N C"]],
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """The flow-matching loss of every image, and the times at which it was taken.

        Args:
          time: tokens of each image -> times before the shift.
          noise: shape -> noise.
        """
        batch = self.complete(frozen, layout, batch)
        valid_BN = batch.given.valid_BS[:, layout.prefix :]
        tokens_B = jnp.sum(valid_BN, axis=1)
        t_B = self.shift(time(tokens_B), tokens_B)
        noise_BNC = noise(batch.latents_BNC.shape)
        x_BNC = flow.interpolate(batch.latents_BNC, noise_BNC, t_B)
        ready = compute_copy(self.assemble(frozen, model), self.run.dtype)
        velocity_BNC = ready(layout, x_BNC, t_B, batch.given, self.run)
        return flow.loss_per_image(velocity_BNC, batch.latents_BNC, noise_BNC, valid_BN), t_B


AHEAD = 4  # losses of a validation that the devices may still have to compute while the next is dispatched
TIME_BINS = 9  # of equal width, in which the training loss is reported


def make_loss(law: TimestepLaw, objective: Objective) -> Loss:
    """Flow-matching loss at times drawn from `law` and shifted by each image's own number of tokens.

    Time and noise of an image come from its own key alone. The further scalars are sums of losses and counts of images,
    both divided by the number of images, for each of `TIME_BINS` parts of [0, 1].
    """

    def loss(model: Any, frozen: Any, layout: Layout, batch: Batch, keys_B: Key[Array, "B"]):
        time_keys_B, noise_keys_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        losses_B, t_B = objective.losses(
            model,
            frozen,
            layout,
            batch,
            lambda tokens_B: law.sample(time_keys_B),
            lambda shape: jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(noise_keys_B),
        )
        bin_B = jnp.minimum((t_B * TIME_BINS).astype(jnp.int32), TIME_BINS - 1)
        scalars = {}
        for place in range(TIME_BINS):
            scalars[f"loss_t/{place:02d}_sum"] = jnp.mean(jnp.where(bin_B == place, losses_B, 0.0))
            scalars[f"loss_t/{place:02d}_count"] = jnp.mean((bin_B == place).astype(jnp.float32))
        return jnp.mean(losses_B), scalars

    return loss


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
