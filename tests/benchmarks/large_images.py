"""Memory, time and exactness of decoding a large image in tiles, with the published widths and random weights.

    python -m tests.benchmarks.large_images                     # 4096 x 4096 pixels
    python -m tests.benchmarks.large_images --tiles 1           # the same, but only its first tile
    python -m tests.benchmarks.large_images --size 1024x256 --tile 256 --whole  # compared with the whole image

It prints the peak resident memory of the process without the weights. Every tile has the same program and shapes, so
the first one shows the peak of all. Then the array of the image is added, whose pages take memory only once they are
written. `--whole` decodes the image as a whole, too, and prints how far both differ, at most and across borders.
"""

import argparse
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from qi2_jax.inference import tiling
from qi2_jax.inference.latents import decode_latents
from qi2_jax.models.vae import VAE, VAEConfig

GIB = 2**30


class Enough(Exception):
    """The stated number of tiles is decoded."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4096x4096", help="width x height in pixels")
    parser.add_argument("--tile", type=int, default=tiling.TILE, help="pixels")
    parser.add_argument("--tiles", type=int, default=0, help="number of tiles after which to stop; 0: all")
    parser.add_argument("--whole", action="store_true", help="compare with the whole image")
    options = parser.parse_args()
    vae = random_decoder()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(vae))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far does not count
    print(f"weights {weights / GIB:.2f} GiB, process with them {resident('VmRSS') / GIB:.2f} GiB", flush=True)
    columns, rows = (int(side) // vae.config.factor for side in options.size.split("x"))
    shape = 1, rows, columns, vae.config.latent_channels
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    tiled = decode(vae, latents, options.tile, options.tiles)
    peak = resident("VmHWM")
    if tiled is None:
        peak += rows * columns * vae.config.factor**2 * vae.config.out_channels * 4
    print(f"peak without weights: {(peak - weights) / GIB:.2f} GiB ({peak / GIB:.2f} GiB with them)", flush=True)
    if options.whole and tiled is not None:
        compare(tiled, np.asarray(decode_latents(vae, latents, jnp.float32)), options.tile)
        print(f"peak of the whole image without weights: {(resident('VmHWM') - weights) / GIB:.2f} GiB")


def random_decoder() -> VAE:
    """The published autoencoder without its encoder, in which no layer is zero."""
    like = jax.eval_shape(lambda: VAE(VAEConfig(), key=jax.random.key(0)))
    del like.encoder, like.quant_conv
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        inputs = math.prod(leaf.shape[1:])
        if len(leaf.shape) > 1 and inputs == 1:
            return jnp.ones(leaf.shape)  # the scale of a norm
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * inputs**-0.5)

    return jax.tree.map(random, like)


def decode(vae: VAE, latents: np.ndarray, tile: int, tiles: int) -> np.ndarray | None:
    """The image, or None after the stated number of tiles. Prints the time of mid block and tiles."""
    count, begun, levels = 0, time.monotonic(), tiling._decoder_levels

    def timed(*arguments: object) -> jax.Array:
        nonlocal count
        if count in (0, 1):
            print(f"{'mid block' if not count else 'first tile'} after {time.monotonic() - begun:.0f} s", flush=True)
        if count == tiles > 0:
            raise Enough
        count += 1
        return levels(*arguments)

    tiling._decoder_levels = timed
    try:
        result = tiling.decode_in_tiles(vae, latents, jnp.float32, tile=tile)
    except Enough:
        result = None
    finally:
        tiling._decoder_levels = levels
    print(f"{count} tiles of {tile} pixels after {time.monotonic() - begun:.0f} s", flush=True)
    return result


def compare(tiled: np.ndarray, whole: np.ndarray, tile: int) -> None:
    """Prints the largest difference, and the mean seam: how much more the tiles change across their borders."""
    difference = np.abs(tiled - whole) / 2 * 255
    print(f"standard deviation {whole.std() / 2 * 255:.1f} of 255; difference at most {difference.max():.2g}")
    for axis in (1, 2):
        if borders := range(tile, whole.shape[axis], tile):
            jumps = [np.abs(np.diff(image, axis=axis)).take(np.array(borders) - 1, axis) for image in (tiled, whole)]
            seam = (jumps[0].mean() - jumps[1].mean()) / 2 * 255
            print(f"mean seam {abs(seam):.2g} of 255 at {len(borders)} borders along axis {axis}")


def resident(name: str) -> int:
    """Resident memory of this process in bytes: now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
