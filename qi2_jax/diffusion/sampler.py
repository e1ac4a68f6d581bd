"""Euler integration of the learned velocity from noise to data.

Dims: `B` batch, `N` target slots, `C` latent channels, `L` layers, `P` prefix slots, `H` heads, `K` head width.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT
from qi2_jax.runtime import compiler
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.sequence import BLOCK_CAUSAL, Layout

AHEAD = 2  # steps in flight on the devices while the next one is dispatched


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The conditional or the unconditional side of guidance: a layout and its content."""

    layout: Layout
    cond: Conditioning


@compiler.jit(static_argnums=(1, 3))
def _prefill(
    model: MMDiT, layout: Layout, cond: Conditioning, execution: Execution
) -> tuple[Float[Array, "L B P H K"], Float[Array, "L B P H K"]]:
    return model.prefill(layout, cond, execution)


@compiler.jit(static_argnums=(1, 6))
def _velocity(
    model: MMDiT,
    layout: Layout,
    x_BNC: Float[Array, "B N C"],
    t_B: Float[Array, "B"],
    cond: Conditioning,
    past: tuple[Float[Array, "L B P H K"], Float[Array, "L B P H K"]] | None,
    execution: Execution,
) -> Float[Array, "B N C"]:
    if past is None:
        return model(layout, x_BNC, t_B, cond, execution)
    return model.decode(layout, x_BNC, t_B, cond, past, execution)


@jax.jit
def _step(
    x_BNC: Float[Array, "B N C"],
    velocity_BNC: Float[Array, "B N C"],
    negative_BNC: Float[Array, "B N C"] | None,
    guidance: Float[Array, ""],
    t_B: Float[Array, "B"],
    next_B: Float[Array, "B"],
) -> Float[Array, "B N C"]:
    if negative_BNC is not None:
        velocity_BNC = negative_BNC + guidance * (velocity_BNC - negative_BNC)
    return x_BNC + (next_B - t_B)[:, None, None] * velocity_BNC


def sample(
    model: MMDiT,
    noise_BNC: Float[AnyArray, "B N C"],
    times: np.ndarray,
    prompt: Prompt,
    *,
    negative: Prompt | None = None,
    guidance: float = 1.0,
    execution: Execution = Execution(),
    cache_prefix: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Float[Array, "B N C"]:
    """Integrates from noise at `times[0]` to data at `times[-1]`, in fp32.

    Args:
      model: transformer that predicts the velocity.
      noise_BNC: initial noise, padded to the layout's target slots.
      times: decreasing times, see `Schedule.times`; [steps + 1, B], or [steps + 1] for all images.
      prompt: prompts with their condition images.
      negative: negative prompts; their layout may have other text slots, but the same target slots.
      guidance: scale of classifier-free guidance; the second pass is skipped unless it is above 1 and `negative` is
        present.
      execution: dtype, kernel and sharding.
      cache_prefix: whether to compute keys and values of text and condition images once instead of at every step, if
        the model's configuration allows it.
      progress: wrapper of the iteration over steps, for a progress bar.

    Returns:
      Latents, normalised per channel as in training; the content of padding slots is undefined.
    """
    sides = [prompt] if negative is None or guidance <= 1 else [prompt, negative]
    if not (model.config.condition_timestep == "zero" and model.config.attention == BLOCK_CAUSAL):
        cache_prefix = False
    pasts = [_prefill(model, side.layout, side.cond, execution) if cache_prefix else None for side in sides]
    x_BNC = jnp.asarray(noise_BNC, jnp.float32)
    times = np.asarray(times, np.float32)
    times_B = np.broadcast_to(times if times.ndim == 2 else times[:, None], (len(times), len(x_BNC)))
    running = InFlight(AHEAD)
    for index in progress(range(len(times) - 1)):
        t_B, next_B = times_B[index], times_B[index + 1]
        velocities = [
            _velocity(model, side.layout, x_BNC, t_B, side.cond, past, execution)
            for side, past in zip(sides, pasts, strict=True)
        ]
        x_BNC = _step(x_BNC, velocities[0], velocities[1] if len(sides) == 2 else None, guidance, t_B, next_B)
        running.add(x_BNC)
    return x_BNC
