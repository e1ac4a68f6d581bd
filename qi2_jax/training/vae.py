"""Training the autoencoder: its loss, its validation, and the statistics of its latents.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `h` `w` rows and columns of latents, `C` latent channels.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qi2_jax.models.vae import VAE


def reconstruct(vae: VAE, pixels_BHWc: Float[Array, "B H W c"]) -> Float[Array, "B H W c"]:
    """Decodes the mode of the posterior; values may leave [-1, 1]."""
    return vae.decode(vae.encode(pixels_BHWc).mean, clamp=False)


def loss(vae: VAE, static: None, pixels_BHWc: Float[Array, "B H W c"], key: Array):
    """Mean absolute error of the reconstruction of pixels in [-1, 1].

    The report of Qwen-Image-VAE-2.0 (section on losses) has no adversarial and no KL term; its perceptual and alignment
    terms need pretrained networks and are not part of this loss.
    """
    error = reconstruct(vae, pixels_BHWc) - pixels_BHWc
    return jnp.mean(jnp.abs(error)), {"psnr": _psnr(error)}


def _psnr(error) -> Float[Array, ""]:
    return 10 * jnp.log10(4.0 / jnp.mean(error * error))  # the range [-1, 1] is 2 wide


def latent_statistics(
    vae: VAE, batches: Iterable[Float[np.ndarray, "B H W c"]], floor: float = 1e-3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over all positions of some batches of pixels.

    Computed from the posterior's mode, added up in float64. A channel that hardly varies gets `floor` as its
    deviation, so that normalising does not amplify noise.
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
