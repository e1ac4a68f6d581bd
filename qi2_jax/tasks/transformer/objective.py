"""The training objective of the transformer: flow matching.

Dims: `B` batch, `S` joint sequence, `N` target slots, `C` latent channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from data_pipeline.loading.batch import Batch
from qi2_jax.diffusion import flow
from qi2_jax.diffusion.timesteps import Shift, TimestepDistribution
from qi2_jax.models.mmdit import Execution, MMDiT
from qi2_jax.sequence import Layout
from qi2_jax.training.mean import Mean
from qi2_jax.training.step import Loss, Scalars

# (frozen, trained) -> the full model; for an adapter, `trained` is only part of it.
Assemble = Callable[[Any, Any], MMDiT]
# (frozen, layout, batch) -> the batch with everything that is computed on the mesh.
Complete = Callable[[Any, Layout, Batch], Batch]


def complete_already(frozen: Any, layout: Layout, batch: Batch) -> Batch:
    """A `Complete` for batches that lack nothing."""
    return batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """The flow-matching loss, the same in training and validation.

    Attributes:
      shift: shift of the timesteps with resolution.
      execution: dtype, kernel and placement of the model.
      assemble: see `Assemble`; by default the trained parameters are the whole model.
      complete: see `Complete`; by default batches are complete.
    """

    shift: Shift
    execution: Execution
    assemble: Assemble = lambda frozen, model: model
    complete: Complete = complete_already

    def losses(
        self,
        model: Any,
        frozen: Any,
        layout: Layout,
        batch: Batch,
        time: Callable[[Float[Array, "B"]], Float[Array, "B"]],
        noise: Callable[[tuple[int, ...]], Float[Array, "B N C"]],
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """The flow-matching loss of every image, and its timestep after the shift.

        Args:
          model: trained parameters.
          frozen: parameters that are not trained.
          layout: layout of the batch.
          batch: images and their conditioning.
          time: function from the number of tokens of each image to timesteps before the shift.
          noise: function from a shape to noise.
        """
        batch = self.complete(frozen, layout, batch)
        valid_BN = batch.cond.valid_BS[:, layout.prefix :]
        tokens_B = jnp.sum(valid_BN, axis=1)
        t_B = self.shift(time(tokens_B), tokens_B)
        noise_BNC = noise(batch.latents_BNC.shape)
        x_BNC = flow.interpolate(batch.latents_BNC, noise_BNC, t_B)
        ready = compute_copy(self.assemble(frozen, model), self.execution)
        velocity_BNC = ready(layout, x_BNC, t_B, batch.cond, self.execution)
        return flow.loss_per_image(velocity_BNC, batch.latents_BNC, noise_BNC, valid_BN), t_B


TIME_BINS = 9  # number of equal intervals of [0, 1] by which the training loss is reported


def make_loss(timesteps: TimestepDistribution, objective: Objective) -> Loss:
    """The flow-matching loss at timesteps drawn from `timesteps` and shifted by each image's number of tokens.

    Timestep and noise of an image depend on its key alone. The further metrics are the mean losses of the images in
    each of `TIME_BINS` intervals of [0, 1].
    """

    def loss(
        model: Any, frozen: Any, layout: Layout, batch: Batch, keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], Scalars]:
        time_keys_B, noise_keys_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        losses_B, t_B = objective.losses(
            model,
            frozen,
            layout,
            batch,
            lambda tokens_B: timesteps.sample(time_keys_B),
            lambda shape: jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(noise_keys_B),
        )
        bin_B = jnp.minimum((t_B * TIME_BINS).astype(jnp.int32), TIME_BINS - 1)
        scalars: Scalars = {}
        for place in range(TIME_BINS):
            total = jnp.mean(jnp.where(bin_B == place, losses_B, 0.0))
            scalars[f"loss_t/{place:02d}"] = Mean(total, jnp.mean((bin_B == place).astype(jnp.float32)))
        return jnp.mean(losses_B), scalars

    return loss


def compute_copy(model: MMDiT, execution: Execution) -> MMDiT:
    """The model with the blocks' matrices in the compute dtype: they are cast before they are gathered, not after.

    Their gradients are then added up across devices in this dtype. If that is not wanted, `Execution.gather` casts.
    """
    if execution.shard_sum not in (None, execution.dtype):
        return model

    def cast(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(leaf.get_value().astype(execution.dtype)) if len(leaf.get_metadata()["axes"]) > 1 else leaf

    blocks = jax.tree.map(cast, model.blocks, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    copy = jax.tree.map(lambda leaf: leaf, model)
    copy.blocks = blocks
    return copy
