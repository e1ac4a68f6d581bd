"""Rotary positions in the half-split layout that both towers use.

Dims: `B` batch (or images), `S` positions, `H` heads, `K` head width.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def frequencies(dim: int, theta: float) -> np.ndarray:
    """Rotary frequencies theta ** (-2i / dim) for i < dim / 2, fp32 [dim / 2], in radians per position."""
    return (theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)


def rotate(x_BSHK: Float[Array, "B S H K"], angles_BSF: Float[Array, "B S F"]) -> Float[Array, "B S H K"]:
    """Rotates channel pairs (i, i + K/2) by `angles` [B, S, K/2]; computed in fp32, returned in the dtype of `x`."""
    first, second = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles_BSF)[:, :, None], jnp.sin(angles_BSF)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSHK.dtype)
