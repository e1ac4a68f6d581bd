"""Embedding tables and rotary positions in the half-split layout that both towers use.

Dims: `B` batch (or images), `S` positions, `H` heads, `K` head width, `D` width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qi2_jax.models.layers import Axes


class Embedding(nnx.Module):
    """A table of vectors, [count, width], looked up in the dtype in which it is stored."""

    def __init__(self, count: int, dim: int, *, key: Array, axes: Axes):
        self.weight = nnx.Param(jax.random.normal(key, (count, dim)), axes=axes)

    def __call__(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.weight[...][index]


def frequencies(dim: int, theta: float) -> np.ndarray:
    """Rotary frequencies theta ** (-2i / dim) for i < dim / 2, fp32 [dim / 2], in radians per position."""
    return (theta ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)


def rotate(x_BSHK: Float[Array, "B S H K"], angles_BSF: Float[Array, "B S F"]) -> Float[Array, "B S H K"]:
    """Rotates channel pairs (i, i + K/2) by `angles` [B, S, K/2]; computed in fp32, returned in the dtype of `x`."""
    first, second = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles_BSF)[:, :, None], jnp.sin(angles_BSF)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSHK.dtype)
