"""Training the transformer: its batch, its loss, its validation.

Dims: `B` batch, `N` target slots, `C` latent channels, `Q` quantiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from qi2_jax.diffusion import flow
from qi2_jax.diffusion.timesteps import Shift, TimestepLaw
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
