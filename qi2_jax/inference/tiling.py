"""Encoding and decoding of large images in tiles, with the result of the whole image and the memory of one tile.

Only the mid block of the autoencoder attends over all positions. It works on the grid of latents, where even a large
image is small, so it sees the whole image here too. The levels around it are convolutions with a limited reach: a
window that exceeds its tile by this reach on every side, where there is image, gives the tile's exact pixels. So
tiles need no blending and have no seams.

Dims: `B` images, `C` latent channels, `D` channels between mid block and levels, `h` `w` rows and columns of latents,
`H` `W` pixels, `c` image channels.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qi2_jax.models.vae import VAE, VAEConfig

TILE = 512  # pixels


def encode_in_tiles(
    vae: VAE, pixels_BHWc: Float[np.ndarray, "B H W c"], dtype: Any, *, tile: int = TILE
) -> Float[np.ndarray, "B h w C"]:
    """Normalised latents (the mode of the posterior) in fp32, as `latents.encode_images`.

    Args:
      vae: autoencoder.
      pixels_BHWc: images in [-1, 1] whose sides are multiples of the factor.
      dtype: dtype of the computation.
      tile: side of a tile in pixels, a multiple of the factor.

    Raises:
      ValueError: if the sides or `tile` are not multiples of the factor.
    """
    factor = vae.config.factor
    _, H, W, _ = pixels_BHWc.shape
    if H % factor or W % factor:
        raise ValueError(f"images are {H} x {W} pixels; resize both to multiples of {factor}")
    grid = H // factor, W // factor

    def level(rows: slice, columns: slice) -> Array:
        rows, columns = (slice(part.start * factor, part.stop * factor) for part in (rows, columns))
        return _encoder_levels(vae, pixels_BHWc[:, rows, columns], dtype)

    features_BhwD = _in_tiles(level, grid, _tile_of(tile, factor), encoder_reach(vae.config), 1)
    return np.asarray(_encoder_head(vae, features_BhwD, dtype))


def decode_in_tiles(
    vae: VAE, latents_BhwC: Float[np.ndarray, "B h w C"], dtype: Any, *, tile: int = TILE
) -> Float[np.ndarray, "B H W c"]:
    """Pixels in [-1, 1] in fp32, decoded from normalised latents, as `latents.decode_latents`.

    Args:
      vae: autoencoder.
      latents_BhwC: normalised latents.
      dtype: dtype of the computation.
      tile: side of a tile in pixels, a multiple of the factor.

    Raises:
      ValueError: if `tile` is not a multiple of the factor.
    """
    factor = vae.config.factor
    size = _tile_of(tile, factor)
    features_BhwD = np.asarray(_decoder_head(vae, latents_BhwC, dtype))

    def level(rows: slice, columns: slice) -> Array:
        return _decoder_levels(vae, features_BhwD[:, rows, columns])

    return _in_tiles(level, latents_BhwC.shape[1:3], size, decoder_reach(vae.config), factor)


def encoder_reach(config: VAEConfig) -> int:
    """Latents at the edge of a window that differ from those of the whole image, before the mid block."""
    reach = 1  # of the input convolution, in patches; each level continues in its own pixels
    for level in config.encoder_levels():
        reach += 2 * config.residual_blocks  # a residual block has two convolutions
        if level.factor == 2:
            reach = (reach + 2) // 2  # one pixel more, and then half of them, rounded up
    return reach


def decoder_reach(config: VAEConfig) -> int:
    """Latents at the edge of a window whose pixels differ from those of the whole image, after the mid block."""
    reach = 0
    for level in config.decoder_levels():
        reach += 2 * (config.residual_blocks + 1)
        if level.factor == 2:
            reach = 2 * reach + 1  # twice as many pixels, and one convolution
    return -(-(reach + 1) * config.patch_size // config.factor)  # with the output convolution


def _tile_of(tile: int, factor: int) -> int:
    if tile < factor or tile % factor:
        raise ValueError(f"tile is {tile} pixels; it must be a positive multiple of {factor}")
    return tile // factor


def _in_tiles(
    compute: Callable[[slice, slice], Array], grid: tuple[int, int], tile: int, reach: int, scale: int
) -> np.ndarray:
    """Assembles an array from windows, of which only the tile in their middle is kept.

    Args:
      compute: function of the rows and columns of a window in latents.
      grid: rows and columns of the whole image in latents.
      tile: side of a tile in latents.
      reach: latents by which a window exceeds its tile.
      scale: rows of the result per latent.
    """
    result: np.ndarray | None = None
    for top, bottom, first_row in _windows(grid[0], tile, reach):
        for left, right, first_column in _windows(grid[1], tile, reach):
            rows, columns = (
                slice(first_row, first_row + min(grid[0], tile + 2 * reach)),
                slice(first_column, first_column + min(grid[1], tile + 2 * reach)),
            )
            window = np.asarray(compute(rows, columns))
            if result is None:
                shape = len(window), grid[0] * scale, grid[1] * scale, window.shape[-1]
                result = np.empty(shape, window.dtype)
            inner = window[
                :,
                (top - first_row) * scale : (bottom - first_row) * scale,
                (left - first_column) * scale : (right - first_column) * scale,
            ]
            result[:, top * scale : bottom * scale, left * scale : right * scale] = inner
    assert result is not None
    return result


def _windows(length: int, tile: int, reach: int) -> Iterator[tuple[int, int, int]]:
    """Begin and end of each tile along one side, and the begin of its window.

    All windows have one length, so that one program serves them: near an edge they are moved into the image.
    """
    last = max(0, length - tile - 2 * reach)
    for begin in range(0, length, tile):
        yield begin, min(begin + tile, length), min(max(begin - reach, 0), last)


@functools.partial(jax.jit, static_argnums=2)
def _encoder_levels(vae: VAE, pixels_BHWc: Float[Array, "B H W c"], dtype: Any) -> Float[Array, "B h w D"]:
    return vae.encoder.levels(pixels_BHWc.astype(dtype))


@functools.partial(jax.jit, static_argnums=2)
def _encoder_head(vae: VAE, features_BhwD: Float[Array, "B h w D"], dtype: Any) -> Float[Array, "B h w C"]:
    mean_BhwC = vae.posterior(vae.encoder.head(features_BhwD.astype(dtype))).mean
    return vae.normalize(mean_BhwC.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def _decoder_head(vae: VAE, latents_BhwC: Float[Array, "B h w C"], dtype: Any) -> Float[Array, "B h w D"]:
    return vae.decoder.head(vae.post_quant_conv(vae.denormalize(latents_BhwC).astype(dtype)))


@jax.jit
def _decoder_levels(vae: VAE, features_BhwD: Float[Array, "B h w D"]) -> Float[Array, "B H W c"]:
    return jnp.clip(vae.decoder.levels(features_BhwD), -1.0, 1.0).astype(jnp.float32)
