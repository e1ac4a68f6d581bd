"""Memory, time and exactness of decoding a large image in tiles, with the published widths and random weights.

    python -m tests.benchmarks.large_images                     # 4096 x 4096 pixels
    python -m tests.benchmarks.large_images --tiles 2           # the same, but only its first tiles
    python -m tests.benchmarks.large_images --side 768 --whole  # compared with the whole image

It prints the peak resident memory of the process without the weights. Every tile has the same program and shapes and
its result goes into the same array, so the first tiles show the peak of all. `--whole` decodes the image as a whole,
too, and prints how far both differ, at most and on both sides of the tiles' borders.
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
    parser.add_argument("--side", type=int, default=4096, help="pixels")
    parser.add_argument("--tile", type=int, default=tiling.TILE, help="pixels")
    parser.add_argument("--tiles", type=int, default=0, help="number of tiles after which to stop; 0: all")
    parser.add_argument("--whole", action="store_true", help="compare with the whole image")
    options = parser.parse_args()
    vae = random_decoder()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(vae))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far does not count
    print(f"weights {weights / GIB:.2f} GiB, process with them {resident('VmRSS') / GIB:.2f} GiB", flush=True)
    side = options.side // vae.config.factor
    latents = np.random.default_rng(0).normal(size=(1, side, side, vae.config.latent_channels)).astype(np.float32)
    tiled = decode(vae, latents, options.tile, options.tiles)
    peak = resident("VmHWM")
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
    borders = np.arange(tile, whole.shape[1], tile)
    jumps = [np.abs(image[:, borders] - image[:, borders - 1]).mean() / 2 * 255 for image in (tiled, whole)]
    print(f"standard deviation {whole.std() / 2 * 255:.1f} of 255; difference at most {difference.max():.2g}")
    print(f"mean seam {abs(jumps[0] - jumps[1]):.2g} of 255 at {len(borders)} horizontal borders")


def resident(name: str) -> int:
    """Resident memory of this process in bytes: now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
