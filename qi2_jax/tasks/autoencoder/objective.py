"""The training objective of the autoencoder: its loss, its validation, and the statistics of its latents.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `h` `w` rows and columns of latents, `C` latent channels.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from qi2_jax.models.layers import AnyArray
from qi2_jax.models.vae import VAE
from qi2_jax.training.step import Loss, Scalars


def reconstruct(vae: VAE, pixels_BHWc: Float[AnyArray, "B H W c"]) -> Float[Array, "B H W c"]:
    """Decodes the mode of the posterior; values may lie outside [-1, 1]."""
    return vae.decode(vae.encode(pixels_BHWc).mean, clamp=False)


ERRORS = {"absolute": jnp.abs, "squared": jnp.square}


def make_loss(kind: str) -> Loss:
    """The mean error of reconstructed pixels in [-1, 1].

    The reports name a reconstruction term without its form. "absolute" keeps edges sharp. "squared" learns faster from
    scratch, where absolute errors miss small dark letters on a bright ground. The perceptual and alignment terms of the
    Qwen-Image-VAE-2.0 report need pretrained networks and are not part of this loss. As in the report, there is no
    adversarial and no KL term.

    Args:
      kind: a key of `ERRORS`.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind not in ERRORS:
        raise ValueError(f"loss {kind!r} of the autoencoder is unknown; choose one of {sorted(ERRORS)}")

    def loss(
        vae: VAE, frozen: None, static: None, pixels_BHWc: Float[AnyArray, "B H W c"], keys_B: Key[Array, "B"]
    ) -> tuple[Float[Array, ""], Scalars]:
        error = reconstruct(vae, pixels_BHWc) - pixels_BHWc
        return jnp.mean(ERRORS[kind](error)), {"psnr": _psnr(error)}

    return loss


def _psnr(error: Float[Array, "B H W c"]) -> Float[Array, ""]:
    return 10 * jnp.log10(4.0 / jnp.mean(error * error))  # the range [-1, 1] is 2 wide


def make_validation(loss: Loss) -> Callable[[VAE, Any, int], dict[str, float]]:
    """Makes a function `(vae, pixels_BHWc, count) -> metrics` with the mean `loss` and `psnr` of the first rows.

    Each image is evaluated by itself, so the metrics do not depend on how the batch is filled up.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def means(vae: VAE, pixels_BHWc: Float[AnyArray, "B H W c"], count: int) -> Scalars:
        def of_image(pixels_HWc: Float[Array, "H W c"]) -> Scalars:
            value, metrics = loss(vae, None, None, pixels_HWc[None], jax.random.key(0)[None])
            return {"loss": value, **metrics}

        of_images = jax.vmap(of_image)(pixels_BHWc)
        return jax.tree.map(lambda values_B: jnp.mean(values_B[:count]), of_images)

    return lambda vae, pixels_BHWc, count: {
        name: float(value) for name, value in jax.device_get(means(vae, pixels_BHWc, count)).items()
    }


def latent_statistics(
    vae: VAE, batches: Iterable[Float[np.ndarray, "B H W c"]], floor: float = 1e-3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over all positions of some batches of pixels.

    They are computed from the posterior's mode and added up in float64.

    Args:
      vae: autoencoder.
      batches: pixels in [-1, 1].
      floor: smallest standard deviation, so that normalising does not amplify the noise of a constant channel.
    """
    encode = jax.jit(lambda vae, pixels: vae.encode(pixels).mean)
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for pixels in batches:
        latents = np.asarray(encode(vae, pixels), np.float64)
        flat = latents.reshape(-1, latents.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, floor**2))
    return tuple(mean.tolist()), tuple(std.tolist())
