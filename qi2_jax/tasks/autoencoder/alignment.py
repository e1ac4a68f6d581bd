"""The alignment of latents with the features of a frozen network, so that a diffusion model learns them more easily.

The two terms are those of VA-VAE (arXiv 2501.01423, section 3.2, and the released code), which Qwen-Image-VAE-2.0
(arXiv 2605.13565) uses with features of a middle layer of DINOv2. For latents z' = W z, features f and N positions:

    cosine   = 1/N   sum over p     of ReLU(1 - cos(z'_p, f_p) - cosine_margin)
    distance = 1/N^2 sum over p, q  of ReLU(|cos(z'_p, z'_q) - cos(f_p, f_q)| - distance_margin)

The distance term of an image with more than `MAX_POSITIONS` latents compares those of a coarser grid.

The learned projection W is trained with the autoencoder and is not part of the exported model. The sum of both terms is
weighted such that its gradient at the encoder's last layer is `alignment.weight` times that of the reconstruction. In
VA-VAE's released schedule, this weight is 0.5 at first and 0.1 later; see `schedule`.

Dims: `B` batch, `H` `W` pixels, `h` `w` rows and columns of latents, `N` = h w, `C` input and `O` output channels of a
convolution, `k` its kernel, `F` channels of the features.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qi2_jax.models.dinov2 import Dinov2, normalize
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.lpips import LPIPS
from qi2_jax.models.vae import VAE, Posterior
from qi2_jax.tasks.autoencoder.balance import ratio, with_gradient, with_last
from qi2_jax.tasks.autoencoder.config import AlignmentConfig
from qi2_jax.training.step import Scalars

MAX_RATIO = 1e8  # of gradient norms, as in the released code
MAX_POSITIONS = 4_096  # matrices of N x N cosines then have at most 64 MiB per image
LENGTH_EPSILON = 1e-12  # least length by which a vector is divided


class Schedule(NamedTuple):
    """The values of the alignment that change during training; see `AlignmentConfig`."""

    cosine_margin: float
    distance_margin: float
    weight: float


def schedule(config: AlignmentConfig, step: int) -> Schedule:
    """The values of the update after `step` updates: strict at first, later relaxed."""
    after = step - config.strict_steps
    share = float(after >= 0) if not config.relaxing_steps else min(max(after / config.relaxing_steps, 0.0), 1.0)
    weight = (1 - share) * config.weight + share * (config.relaxed_weight or config.weight)
    return Schedule(config.cosine_margin * share, config.distance_margin * share, weight)


def feature_channels(network: LPIPS | Dinov2, layer: int) -> int:
    """Channels of a layer's features.

    Raises:
      ValueError: if the network has no such layer.
    """
    if isinstance(network, Dinov2):
        first, count, normed = 0, network.config.layers, ", and 0 for the last one after the final norm"
    else:
        first, count, normed = 1, len(network.config.widths), ""
    if not first <= layer <= count:
        raise ValueError(f"alignment.layer is {layer}; this network has the layers 1 to {count}{normed}")
    return network.config.width if isinstance(network, Dinov2) else network.config.widths[layer - 1]


def feature_map(
    network: LPIPS | Dinov2,
    layer: int,
    images_BHWc: Float[AnyArray, "B H W 3"],
    grid: tuple[int, int],
    dtype: Any = jnp.float32,
) -> Float[Array, "B h w F"]:
    """Features of RGB images in [-1, 1] on the grid of their latents.

    DINOv2 reads images that are resized, with antialiasing, such that its patches are the grid: 256 pixels become 224,
    the size that VA-VAE gives it. The features of VGG16 are resized themselves.

    Args:
      network: frozen network.
      layer: `alignment.layer` of the config.
      images_BHWc: images.
      grid: rows and columns of the latents.
      dtype: dtype of the activations.
    """
    if isinstance(network, Dinov2):
        size = tuple(side * network.config.patch for side in grid)
        resized = jax.image.resize(images_BHWc, (len(images_BHWc), *size, 3), "linear")
        return network.feature_map(normalize(resized).astype(dtype), layer or None)
    features = network.features(images_BHWc.astype(dtype))[layer - 1]
    return jax.image.resize(features, (len(features), *grid, features.shape[-1]), "linear")


def terms(
    projected_BhwF: Float[AnyArray, "B h w F"],
    features_BhwF: Float[AnyArray, "B h w F"],
    margins_B2: Float[AnyArray, "B 2"],
) -> tuple[Float[Array, ""], Scalars]:
    """The sum of both terms, and as metrics each term and the mean cosine between latents and features.

    Args:
      projected_BhwF: projected latents.
      features_BhwF: features of the same places.
      margins_B2: cosine and distance margin for each image.
    """
    cosine_BN = jnp.sum(_unit(projected_BhwF) * _unit(features_BhwF), axis=-1)
    z_BNF, f_BNF = (_unit(_thinned(x)) for x in (projected_BhwF, features_BhwF))
    distance_BNN = jnp.abs(_cosines(z_BNF) - _cosines(f_BNF))
    cosine = jnp.mean(jax.nn.relu(1 - cosine_BN - margins_B2[:, :1]))
    distance = jnp.mean(jax.nn.relu(distance_BNN - margins_B2[:, 1, None, None]))
    metrics = {"cosine": cosine, "distance": distance, "similarity": jnp.mean(cosine_BN)}
    return cosine + distance, {f"alignment/{name}": value for name, value in metrics.items()}


def _thinned(x_BhwF: Float[AnyArray, "B h w F"]) -> Float[AnyArray, "B _ _ F"]:
    """Every k-th row and column, with the smallest k that leaves at most `MAX_POSITIONS` positions."""
    _, h, w, _ = x_BhwF.shape
    step = next(k for k in itertools.count(1) if -(-h // k) * -(-w // k) <= MAX_POSITIONS)
    return x_BhwF[:, ::step, ::step]


def _unit(x_BhwF: Float[AnyArray, "B h w F"]) -> Float[Array, "B N F"]:
    x = x_BhwF.reshape(x_BhwF.shape[0], -1, x_BhwF.shape[-1]).astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, LENGTH_EPSILON**2))


def _cosines(unit_BNF: Float[Array, "B N F"]) -> Float[Array, "B N N"]:
    return jnp.einsum("bnf,bmf->bnm", unit_BNF, unit_BNF)


# (posterior, vae) -> (value, metrics)
Part = Callable[[Posterior, Any], tuple[Float[Array, ""], Scalars]]


def balanced(
    vae: VAE,
    encode: Callable[[Any], Posterior],
    reconstruction: Part,
    alignment: Part,
    weight: Float[AnyArray, ""],
) -> tuple[Posterior, Float[Array, ""], Scalars]:
    """The reconstruction's loss plus the weighted alignment, with its metrics, and the posterior of the images.

    The alignment's factor is `weight * |g_reconstruction| / |g_alignment|` with the norms of both gradients at the
    encoder's last convolution, as in VA-VAE. Differentiation treats it as a constant. Both parts are differentiated
    here, and the result carries these gradients, so that decoder and frozen networks run backwards only once.

    Args:
      vae: autoencoder.
      encode: encoding of the images of the batch by an autoencoder.
      reconstruction, alignment: parts of the loss.
      weight: weight of the update, see `Schedule`.
    """
    fixed = jax.lax.stop_gradient
    last = vae.encoder.conv_out.weight[...]
    posterior, to_last = jax.vjp(lambda last: encode(with_last(vae, "encoder", last)), last)
    point = (posterior, vae)
    (value, metrics), gradient = jax.value_and_grad(_pair(reconstruction), has_aux=True)(fixed(point))
    (aligned, more), towards = jax.value_and_grad(_pair(alignment), has_aux=True)(fixed(point))
    at_last, towards_at_last = (to_last(of_posterior)[0] for of_posterior, _ in (gradient, towards))
    factor = fixed(weight * ratio(at_last, towards_at_last, MAX_RATIO))
    total = jax.tree.map(lambda ours, theirs: ours + factor * theirs, gradient, towards)
    metrics = {"reconstruction": value, **metrics, **more, "alignment/weight": factor}
    return posterior, with_gradient(value + factor * aligned, point, fixed(total)), metrics


def _pair(part: Part) -> Callable[[tuple[Posterior, Any]], Any]:
    return lambda point: part(*point)
