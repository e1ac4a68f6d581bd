"""The initial noise of the sampler.

Dims: `B` images, `N` target slots, `C` latent channels.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

MAX_SEED = 1 << 32


def initial_noise(seed: int, tokens: Sequence[int], slots: int, channels: int) -> Float[np.ndarray, "B N C"]:
    """Standard normal noise for a batch of images; the noise of image i depends on `seed + i` and its size alone.

    The same image therefore gets the same noise however images are divided into batches: a batch that begins with
    image i of a longer list passes `seed + i`.

    Args:
      seed: seed of the first image; seeds wrap around at 2^32.
      tokens: target tokens of each image.
      slots: target slots of the batch's layout; those after an image's tokens are 0.
      channels: latent channels.
    """
    noise = np.zeros((len(tokens), slots, channels), np.float32)
    for place, count in enumerate(tokens):
        key = jax.random.key((seed + place) % MAX_SEED)
        noise[place, :count] = jax.random.normal(key, (count, channels))
    return noise
