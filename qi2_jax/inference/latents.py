"""Encoding images to normalised latents, and decoding them.

Dims: `B` images, `C` latent channels, `h` `w` rows and columns of latents, `H` `W` pixels, `c` image channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qi2_jax.models.vae import VAE
from qi2_jax.runtime import compiler


@compiler.jit(static_argnums=2)
def encode_images(vae: VAE, pixels_BHWc: Float[Array, "B H W c"], dtype: Any) -> Float[Array, "B h w C"]:
    """Normalised latents (the mode of the posterior), in fp32."""
    return vae.normalize(vae.encode(pixels_BHWc.astype(dtype)).mean.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def decode_latents(vae: VAE, latents_BhwC: Float[Array, "B h w C"], dtype: Any) -> Float[Array, "B H W c"]:
    """Pixels in [-1, 1], decoded from normalised latents, in fp32."""
    return vae.decode(vae.denormalize(latents_BhwC).astype(dtype)).astype(jnp.float32)
