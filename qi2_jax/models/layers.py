"""Layers shared by the models.

Every parameter is an `nnx.Param` that carries `axes`, the logical names of its dims (`qi2_jax.sharding` maps them to a
mesh). Weights keep PyTorch's orientation (`Linear` [out, in], `Conv2d` [out, in, height, width]), so that exchanging
weights needs renaming but no transposition; XLA contracts either orientation at the same cost.

Parameters are stored in the dtype of the state (fp32 while training); a layer computes in the dtype of its input.

Dims: `B` batch, `D` width, `I` input width, `O` output width.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Axes = tuple[str | None, ...]
AnyArray = Any  # an array of a batch: NumPy on the host, a jax.Array on the devices
Module = TypeVar("Module", bound=nnx.Module)


def keys(key: Array) -> Iterator[Array]:
    """Yields fresh random keys from one key, for constructors that initialise many parameters."""
    while True:
        key, sub = jax.random.split(key)
        yield sub


def stacked(make: Callable[[Array], Module], count: int, key: Array) -> Module:
    """Builds `count` equal modules as one module whose parameters have a leading dim of `count` layers."""
    return jax.vmap(make)(jax.random.split(key, count))


class Linear(nnx.Module):
    """`y = x W^T + b`, with W [out, in]. Initialised with a normal of standard deviation `in ** -0.5` times `gain`."""

    def __init__(self, in_dim: int, out_dim: int, *, key: Array, axes: Axes, bias: bool = False, gain: float = 1.0):
        std = gain * in_dim**-0.5
        self.weight = nnx.Param(std * jax.random.normal(key, (out_dim, in_dim)), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_dim,)), axes=(axes[0],)) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = product(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def product(x: Float[Array, "... I"], weight_OI: Float[AnyArray, "O I"]) -> Float[Array, "... O"]:
    """`x W^T` in the dtype of x. The gradient of W is summed over tokens and devices in the dtype of W.

    On CPU, it is a product of two matrices. Otherwise XLA's CPU backend writes a transposed copy of `x` and of the
    gradient of the result, if `x` has more than two dims. Other platforms keep the dims apart, because the first ones
    may be sharded.
    """
    return jnp.einsum("...i,oi->...o", x, weight_OI.astype(x.dtype))


def _product_forward(x: Any, weight_OI: Any) -> tuple[Any, Any]:
    # Without a gradient of one operand, as for the frozen layers of an adapter, the other one need not be kept.
    kept = x.value if weight_OI.perturbed else None, weight_OI.value.astype(x.value.dtype) if x.perturbed else None
    return product(x.value, weight_OI.value), (*kept, jnp.empty(0, weight_OI.value.dtype))


def _product_backward(kept: Any, dy: Any) -> tuple[Any, Any]:
    x, weight_OI, empty = kept
    dx = None if weight_OI is None else jnp.einsum("...o,oi->...i", dy, weight_OI)
    if x is None:
        return dx, None
    return dx, jax.lax.platform_dependent(
        dy,
        x,
        cpu=lambda dy, x: jnp.dot(
            dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]), preferred_element_type=empty.dtype
        ),
        default=lambda dy, x: jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=empty.dtype),
    )


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Embedding(nnx.Module):
    """Lookup in a table of vectors, [count, width], in its stored dtype."""

    def __init__(self, count: int, dim: int, *, key: Array, axes: Axes):
        self.weight = nnx.Param(jax.random.normal(key, (count, dim)), axes=axes)

    def __call__(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.weight[...][index]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, computed in fp32 and scaled by `offset + weight`.

    `offset=1` is the zero-centred form, in which a stored weight of 0 means scale 1; `offset=0` is the usual form.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, offset: float = 0.0):
        self.weight = nnx.Param(jnp.full((dim,), 1.0 - offset, jnp.float32), axes=(None,))
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * (self.weight[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last dim with weight and bias, computed in fp32."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones((dim,)), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((dim,)), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = standardize(x.astype(jnp.float32), self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def standardize(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Layer norm without parameters: zero mean and unit variance over the last dim, computed in fp32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)
