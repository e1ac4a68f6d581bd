"""Encoding and decoding of large images in tiles, with the result of the whole image and the memory of one tile.

Only the mid block of the autoencoder attends over all positions. It works on the grid of latents, where even a large
image is small, so it sees the whole image here too. The levels around it are convolutions with a limited reach: a
window that exceeds its tile by this reach on every side, where there is image, gives the tile's exact pixels. So
tiles need no blending and have no seams. The reach that remains shrinks from level to level, so the decoder, whose last
levels are the most expensive, trims its window after each of them.

Dims: `B` images, `C` latent channels, `D` channels between mid block and levels, `h` `w` rows and columns of latents,
`H` `W` pixels, `c` image channels.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qi2_jax.inference.latents import decode_latents, encode_images
from qi2_jax.models.layers import AnyArray
from qi2_jax.models.vae import VAE, VAEConfig

TILE = 512  # pixels

# Pixels of the largest images that are computed as a whole, by `encode` and `decode`. In fp32 and with the published
# widths, the largest activation of such an image takes about 2 GiB. Buckets of 2048 x 2048 pixels are encoded whole.
MAX_ENCODED_WHOLE = 2304 * 2304
MAX_DECODED_WHOLE = 1280 * 1280

Place = Callable[[np.ndarray], Any]


def encode(
    vae: VAE, pixels_BHWc: Float[np.ndarray, "B H W c"], dtype: Any, *, place: Place = np.asarray
) -> Float[AnyArray, "B h w C"]:
    """Normalised latents in fp32; images above `MAX_ENCODED_WHOLE` pixels are encoded in tiles.

    Args:
      vae: autoencoder.
      pixels_BHWc: images in [-1, 1].
      dtype: dtype of the computation.
      place: see `encode_in_tiles`.

    Returns:
      A host array for tiles, and otherwise a device array that may still be computed.
    """
    if _pixels(pixels_BHWc.shape) > MAX_ENCODED_WHOLE:
        return encode_in_tiles(vae, pixels_BHWc, dtype, place=place)
    return encode_images(vae, place(pixels_BHWc), dtype)


def decode(vae: VAE, latents_BhwC: Float[np.ndarray, "B h w C"], dtype: Any) -> Float[np.ndarray, "B H W c"]:
    """Pixels in [-1, 1] in fp32; images above `MAX_DECODED_WHOLE` pixels are decoded in tiles."""
    if _pixels(latents_BhwC.shape) * vae.config.factor**2 > MAX_DECODED_WHOLE:
        return decode_in_tiles(vae, latents_BhwC, dtype)
    return np.asarray(decode_latents(vae, latents_BhwC, dtype))


def _pixels(shape: tuple[int, ...]) -> int:
    return shape[1] * shape[2]


def encode_in_tiles(
    vae: VAE,
    pixels_BHWc: Float[np.ndarray, "B H W c"],
    dtype: Any,
    *,
    tile: int = TILE,
    place: Place = np.asarray,
) -> Float[np.ndarray, "B h w C"]:
    """Normalised latents (the mode of the posterior) in fp32, as `latents.encode_images`.

    Args:
      vae: autoencoder.
      pixels_BHWc: images in [-1, 1] whose sides are multiples of the factor.
      dtype: dtype of the computation.
      tile: side of a tile in pixels, a multiple of the factor.
      place: function that puts a batch of windows on its devices.

    Raises:
      ValueError: if the sides or `tile` are not multiples of the factor.
    """
    factor = vae.config.factor
    _, H, W, _ = pixels_BHWc.shape
    if H % factor or W % factor:
        raise ValueError(f"images are {H} x {W} pixels; resize both to multiples of {factor}")
    grid = H // factor, W // factor
    tiles, reach = _tile_of(tile, factor, grid), encoder_reach(vae.config)

    def level(begin: tuple[int, int]) -> np.ndarray:
        windows = [_window(first, size, reach, length) for first, size, length in zip(begin, tiles, grid, strict=True)]
        rows, columns = (window.scaled(factor).slice for window in windows)
        features_BhwD = np.asarray(_encoder_levels(vae, place(pixels_BHWc[:, rows, columns]), dtype))
        top, left = (first - window.start for first, window in zip(begin, windows, strict=True))
        return features_BhwD[:, top : top + tiles[0], left : left + tiles[1]]

    features_BhwD = _in_tiles(level, grid, tiles, 1)
    return np.asarray(_encoder_head(vae, place(features_BhwD), dtype))


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
    config = vae.config
    grid = latents_BhwC.shape[1], latents_BhwC.shape[2]
    tiles = _tile_of(tile, config.factor, grid)
    features_BhwD = np.asarray(_decoder_head(vae, latents_BhwC, dtype))

    def level(begin: tuple[int, int]) -> np.ndarray:
        (rows, row_trims), (columns, column_trims) = map(functools.partial(_trims, config), begin, tiles, grid)
        starts = np.array([row_trims, column_trims], np.int32)[..., 0].T
        sizes = tuple((row.size, column.size) for row, column in zip(row_trims, column_trims, strict=True))
        return np.asarray(_decoder_levels(vae, features_BhwD[:, rows.slice, columns.slice], starts, sizes))

    return _in_tiles(level, grid, tiles, config.factor)


def encoder_reach(config: VAEConfig) -> int:
    """Latents at the edge of a window that differ from those of the whole image, before the mid block."""
    reach = 1  # of the input convolution, in patches; each level continues in its own pixels
    for level in config.encoder_levels():
        reach += 2 * config.residual_blocks  # a residual block has two convolutions
        if level.factor == 2:
            reach = (reach + 2) // 2  # one pixel more, and then half of them, rounded up
    return reach


def decoder_margins(config: VAEConfig) -> tuple[int, ...]:
    """Pixels by which a window must exceed its tile, before each level and before the output, in the pixels there."""
    margins = [1]  # of the output convolution
    for level in reversed(config.decoder_levels()):
        after = margins[0]
        if level.factor == 2:
            after = (after + 2) // 2  # one convolution more, of twice as many pixels
        margins.insert(0, after + 2 * (config.residual_blocks + 1))
    return tuple(margins)


class Span(NamedTuple):
    """A part of one side of an image."""

    start: int
    size: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)

    def scaled(self, factor: int) -> "Span":
        return Span(self.start * factor, self.size * factor)


def _window(begin: int, tile: int, margin: int, length: int) -> Span:
    """The window of a tile along one side.

    All windows have one size, so that one program serves them: near an edge they are moved into the image.
    """
    size = min(length, tile + 2 * margin)
    return Span(min(max(begin - margin, 0), length - size), size)


def _trims(config: VAEConfig, begin: int, tile: int, length: int) -> tuple[Span, list[Span]]:
    """The decoder's window of a tile along one side, and what to keep of the results of each level and of the output.

    Args:
      config: architecture.
      begin: first latent of the tile.
      tile: latents of the tile.
      length: latents of the whole side.
    """
    scale, windows, trims = 1, list[Span](), list[Span]()
    factors = [*(level.factor for level in config.decoder_levels()), config.patch_size]
    for factor, margin in zip([1, *factors], [*decoder_margins(config), 0], strict=True):
        scale *= factor
        window = _window(begin * scale, tile * scale, margin, length * scale)
        if windows:
            trims.append(Span(window.start - windows[-1].start * factor, window.size))
        windows.append(window)
    return windows[0], trims


def _tile_of(tile: int, factor: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile in latents."""
    if tile < factor or tile % factor:
        raise ValueError(f"tile is {tile} pixels; it must be a positive multiple of {factor}")
    return min(tile // factor, grid[0]), min(tile // factor, grid[1])


def _in_tiles(
    compute: Callable[[tuple[int, int]], np.ndarray], grid: tuple[int, int], tiles: tuple[int, int], scale: int
) -> np.ndarray:
    """Assembles an array from tiles of one size; the last ones are moved into the image and overlap others.

    Args:
      compute: function of the first row and column of a tile in latents.
      grid: rows and columns of the whole image in latents.
      tiles: rows and columns of a tile in latents.
      scale: rows of the result per latent.
    """
    result: np.ndarray | None = None
    for top, left in itertools.product(*map(_begins, grid, tiles)):
        part = compute((top, left))
        if result is None:
            result = np.empty((len(part), grid[0] * scale, grid[1] * scale, part.shape[-1]), part.dtype)
        rows, columns = Span(top, tiles[0]).scaled(scale), Span(left, tiles[1]).scaled(scale)
        result[:, rows.slice, columns.slice] = part
    assert result is not None
    return result


def _begins(length: int, tile: int) -> list[int]:
    """First latents of the tiles along one side."""
    return [min(begin, length - tile) for begin in range(0, length, tile)]


@functools.partial(jax.jit, static_argnums=2)
def _encoder_levels(vae: VAE, pixels_BHWc: Float[AnyArray, "B H W c"], dtype: Any) -> Float[Array, "B h w D"]:
    return vae.encoder.levels(pixels_BHWc.astype(dtype))


@functools.partial(jax.jit, static_argnums=2)
def _encoder_head(vae: VAE, features_BhwD: Float[AnyArray, "B h w D"], dtype: Any) -> Float[Array, "B h w C"]:
    mean_BhwC = vae.posterior(vae.encoder.head(features_BhwD.astype(dtype))).mean
    return vae.normalize(mean_BhwC.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def _decoder_head(vae: VAE, latents_BhwC: Float[AnyArray, "B h w C"], dtype: Any) -> Float[Array, "B h w D"]:
    return vae.decoder.head(vae.post_quant_conv(vae.denormalize(latents_BhwC).astype(dtype)))


@functools.partial(jax.jit, static_argnums=3)
def _decoder_levels(
    vae: VAE,
    features_BhwD: Float[AnyArray, "B h w D"],
    starts_L2: Int[AnyArray, "L 2"],
    sizes: tuple[tuple[int, int], ...],
) -> Float[Array, "B H W c"]:
    """The levels and the output, each of whose results is trimmed to a size from a start."""
    x = jnp.asarray(features_BhwD)
    layers: list[Callable[[Array], Array]] = [*vae.decoder.up_blocks, vae.decoder.output]
    for block, start, size in zip(layers, starts_L2, sizes, strict=True):
        x = block(x)
        x = jax.lax.dynamic_slice(x, (0, *start, 0), (len(x), *size, x.shape[-1]))
    return jnp.clip(x, -1.0, 1.0).astype(jnp.float32)
