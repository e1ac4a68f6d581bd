"""The linear path between data and noise, and the loss on its velocity.

Dims: `B` batch, `N` target slots, `C` latent channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qi2_jax.models.layers import AnyArray


def interpolate(
    data_BNC: Float[AnyArray, "B N C"], noise_BNC: Float[AnyArray, "B N C"], t_B: Float[AnyArray, "B"]
) -> Float[AnyArray, "B N C"]:
    """`x_t = (1 - t) data + t noise` (Qwen-Image-2.0-RL report, flow-matching objective)."""
    t = t_B[:, None, None]
    return (1 - t) * data_BNC + t * noise_BNC


def loss_per_image(
    velocity_BNC: Float[AnyArray, "B N C"],
    data_BNC: Float[AnyArray, "B N C"],
    noise_BNC: Float[AnyArray, "B N C"],
    valid_BN: Bool[AnyArray, "B N"],
) -> Float[Array, "B"]:
    """Mean squared error of the velocity `noise - data` over each image's valid tokens and channels, in fp32."""
    error = velocity_BNC.astype(jnp.float32) - (noise_BNC - data_BNC).astype(jnp.float32)
    per_token_BN = jnp.mean(error * error, axis=-1)
    return jnp.sum(jnp.where(valid_BN, per_token_BN, 0.0), axis=1) / jnp.maximum(jnp.sum(valid_BN, axis=1), 1)
