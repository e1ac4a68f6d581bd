"""Training the autoencoder: its loss, its validation, and the statistics of its latents.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `h` `w` rows and columns of latents, `C` latent channels.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from qi2_jax.models.vae import VAE
from qi2_jax.training.step import Loss


def reconstruct(vae: VAE, pixels_BHWc: Float[Array, "B H W c"]) -> Float[Array, "B H W c"]:
    """Decodes the mode of the posterior; values may leave [-1, 1]."""
    return vae.decode(vae.encode(pixels_BHWc).mean, clamp=False)


ERRORS = {"absolute": jnp.abs, "squared": jnp.square}


def make_loss(kind: str) -> Loss:
    """The mean error of reconstructed pixels in [-1, 1].

    The reports name a reconstruction term without its form. "absolute" keeps edges sharp; "squared" learns faster from
    scratch, where absolute errors leave out small dark letters on a bright ground. The perceptual and alignment terms
    of the Qwen-Image-VAE-2.0 report need pretrained networks and are not part of this loss; like there, it has no
    adversarial and no KL term.

    Args:
      kind: one of `ERRORS`.

    Raises:
      ValueError: for another kind.
    """
    if kind not in ERRORS:
        raise ValueError(f"loss {kind!r} of the autoencoder is unknown; choose one of {sorted(ERRORS)}")

    def loss(vae: VAE, frozen: None, static: None, pixels_BHWc: Float[Array, "B H W c"], keys_B: Key[Array, "B"]):
        error = reconstruct(vae, pixels_BHWc) - pixels_BHWc
        return jnp.mean(ERRORS[kind](error)), {"psnr": _psnr(error)}

    return loss


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
