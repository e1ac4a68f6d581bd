"""The data of the autoencoder's run: random crops for training, and held-out images for validation and drawings.

Dims: `B` batch, `H` `W` pixels, `c` image channels.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from data_pipeline.loading.crops import SelectedImages, center_crop
from data_pipeline.samples.held_out import is_held
from qi2_jax.pixels import normalize
from qi2_jax.runtime import processes
from qi2_jax.tasks.autoencoder.objective import Crop
from qi2_jax.training.microbatch import Microbatch, Stats

MAX_CACHED_BYTES = 1 << 30  # images that take no more memory than this are decoded once
VALIDATION_IMAGES = 16
DRAWN_IMAGES = 4
MAX_DRAWN_SIDE = 512  # pixels
MAX_SCANNED = 100_000  # records in which held-out images are searched, which takes seconds


def microbatch(
    pixels_BHWc: Float[np.ndarray, "B H W c"], batch_size: int, margins: tuple[float, float] | None = None
) -> Microbatch:
    """A batch of this process's crops.

    Args:
      pixels_BHWc: crops of this process, in [-1, 1].
      batch_size: global number of crops.
      margins: cosine and distance margin of the alignment; None: no alignment.
    """
    if margins is None:
        return Microbatch(None, Crop(pixels_BHWc), stats=Stats(batch_size))
    names = "alignment/cosine_margin", "alignment/distance_margin"
    repeated_B2 = np.full((len(pixels_BHWc), 2), margins, np.float32)
    stats = Stats(batch_size, metrics=dict(zip(names, margins, strict=True)))
    return Microbatch(None, Crop(pixels_BHWc, repeated_B2), stats=stats)


def held_out_indices(images: SelectedImages, fraction: float, count: int = VALIDATION_IMAGES) -> list[int]:
    """Indices of the first `count` images that the hold-out rule of the samples selects.

    The rule holds these images out from the transformer. The autoencoder itself trains on every image. With a fraction
    of 0 nothing is held out, and the first training images are used, as for the transformer.

    Args:
      images: training images.
      fraction: `data.held_out` of the config.
      count: largest number of images.
    """
    if not fraction:
        return list(range(min(count, len(images))))
    scanned = range(min(len(images), MAX_SCANNED))
    found = list(itertools.islice((i for i in scanned if is_held(images.record(i), fraction)), count))
    if not found:
        processes.log_on_main(
            f"none of the first {len(scanned):,} images is held out with data.held_out={fraction}: the autoencoder is "
            "validated on training images"
        )
        return list(range(min(count, len(images))))
    return found


def validation_pixels(images: SelectedImages, indices: Sequence[int], side: int) -> Float[np.ndarray, "B H W c"]:
    """The central crops of images, in [-1, 1]."""
    return np.stack([normalize(center_crop(images[index], side)) for index in indices])


def drawn_pixels(images: SelectedImages, indices: Sequence[int], factor: int) -> Float[np.ndarray, "B H W c"]:
    """Images cropped to one common square, as large as possible, in [-1, 1].

    Args:
      images: training images.
      indices: indices of the images.
      factor: pixels of a latent, of which the square's side is a multiple.
    """
    chosen = [images[index] for index in indices]
    side = min(MAX_DRAWN_SIDE, *(size for image in chosen for size in image.shape[:2]))
    return np.stack([normalize(center_crop(image, side // factor * factor)) for image in chosen])
