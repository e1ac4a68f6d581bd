"""Terms of a loss that are weighted by their gradients at one layer.

Dims: `O` output and `C` input channels of a convolution, `k` its kernel.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qi2_jax.models.vae import VAE

Model = TypeVar("Model", bound=VAE)

RATIO_EPSILON = 1e-4  # of the ratio of gradient norms, as in the released code of VA-VAE


def ratio(gradient: Float[Array, "..."], of_term: Float[Array, "..."], maximum: float) -> Float[Array, ""]:
    """The norm of a gradient in units of that of a term, at most `maximum`."""
    norms = [jnp.linalg.norm(one.ravel()) for one in (gradient, of_term)]
    return jnp.clip(norms[0] / (norms[1] + RATIO_EPSILON), 0, maximum)


def with_last(vae: Model, end: str, last: Float[Array, "O C k k"]) -> Model:
    """The autoencoder with another weight of the last convolution of its `encoder` or `decoder`."""
    copy = jax.tree.map(lambda leaf: leaf, vae)
    conv = getattr(copy, end).conv_out
    conv.weight = conv.weight.replace(last)
    return copy


@jax.custom_vjp
def with_gradient(value: Float[Array, ""], point: Any, gradient: Any) -> Float[Array, ""]:
    """`value`, whose gradient with respect to `point` is `gradient`."""
    return value


def _forward(value: Float[Array, ""], point: Any, gradient: Any) -> tuple[Float[Array, ""], Any]:
    return value, gradient


def _backward(gradient: Any, cotangent: Float[Array, ""]) -> tuple[Float[Array, ""], Any, Any]:
    scaled = jax.tree.map(lambda leaf: cotangent * leaf, gradient)
    return jnp.zeros_like(cotangent), scaled, jax.tree.map(jnp.zeros_like, gradient)


with_gradient.defvjp(_forward, _backward)
