"""The data of the autoencoder's run: random crops for training, held-out images, and drawings of these.

Dims: `B` batch, `H` `W` pixels, `c` image channels.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from data_pipeline.loading.crop_batches import CropBatch, Phases
from data_pipeline.loading.crops import SelectedImages, center_crop
from data_pipeline.samples.held_out import hold_out_of
from qi2_jax.pixels import normalize
from qi2_jax.runtime import processes
from qi2_jax.tasks.autoencoder.alignment import Schedule
from qi2_jax.tasks.autoencoder.config import BATCH_METRICS, AutoencoderConfig
from qi2_jax.tasks.autoencoder.objective import Crop
from qi2_jax.training.microbatch import Microbatch, Stats

# Of each value of `alignment.Schedule`; `alignment/weight` is the factor that follows from gradients.
SCHEDULED_METRICS = ("alignment/cosine_margin", "alignment/distance_margin", "alignment/scheduled_weight")
DRAWN_IMAGES = 4
MAX_DRAWN_SIDE = 512  # pixels


class Layout(NamedTuple):
    """What selects the compiled program of a batch.

    Attributes:
      batch_size: global number of crops.
      height, width: size of the crops, in pixels.
      perceptual: whether LPIPS counts.
      adversarial: whether the update belongs to the adversarial phase.
    """

    batch_size: int
    height: int
    width: int
    perceptual: bool
    adversarial: bool


def layout(config: AutoencoderConfig, batch_size: int, size: tuple[int, int], step: int) -> Layout:
    """The layout of the batch of a step."""
    return Layout(batch_size, *size, step >= config.perceptual.start, config.adversarial.is_active(step))


def microbatch(
    pixels_BHWc: Float[np.ndarray, "B H W c"],
    layout: Layout,
    alignment: Schedule | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Microbatch:
    """A batch of this process's crops.

    Args:
      pixels_BHWc: crops of this process, in [-1, 1].
      layout: layout of the batch.
      alignment: values of the alignment; None: no alignment.
      metrics: values to log about the batch.
    """
    metrics = dict(metrics or {})
    if alignment is None:
        return Microbatch(layout, Crop(pixels_BHWc), stats=Stats(layout.batch_size, metrics=metrics))
    repeated_B3 = np.full((len(pixels_BHWc), 3), alignment, np.float32)
    scheduled = dict(zip(SCHEDULED_METRICS, alignment, strict=True))
    stats = Stats(layout.batch_size, metrics=scheduled | metrics)
    return Microbatch(layout, Crop(pixels_BHWc, repeated_B3), stats=stats)


def composition(config: AutoencoderConfig, phases: Phases, step: int, batch: CropBatch) -> dict[str, float]:
    """Metrics that describe the batch of a step, where batches differ: its phase, size, and share of each kind."""
    metrics: dict[str, float] = {}
    number = phases.of_step(step)
    shares = [*config.phases.values()][number].kind_shares
    if len(phases.phases) > 1 or len(phases.phases[0].sizes) > 1:
        _, height, width, _ = batch.pixels_BHWc.shape
        values = number + 1, height, width
        metrics = {f"batch/{name}": value for name, value in zip(BATCH_METRICS, values, strict=True)}
    if config.kinds:
        used = [kind for kind, share in shares.items() if share]
        drawn = [used[place] for place in batch.kinds]
        metrics |= {f"batch/{kind}": drawn.count(kind) / len(drawn) for kind in config.kinds}
    return metrics


def empty_batches(
    config: AutoencoderConfig, phases: Phases, channels: int
) -> Iterator[tuple[Float[np.ndarray, "B H W c"], Layout]]:
    """Blank pixels for each layout of the batches."""
    seen = set()
    starts = [phase.start for phase in phases.phases]
    for phase, end in zip(phases.phases, [*starts[1:], math.inf], strict=True):
        changes = sorted({config.perceptual.start, config.adversarial.start})
        steps = [phase.start, *(step for step in changes if phase.start < step < end)]
        for size, step in itertools.product(phase.sizes, steps):
            if (found := layout(config, phase.batch_size, size, step)) not in seen:
                seen.add(found)
                rows = phase.batch_size if phase.rows is None else len(phase.rows)
                yield np.zeros((rows, *size, channels), np.float32), found


def split_held_out(images: SelectedImages, fraction: float) -> tuple[SelectedImages, SelectedImages]:
    """Splits images into those to train on and those to validate on, by the hold-out rule of all stages and tasks.

    With a fraction of 0 nothing is held out, and training images validate, as for the transformer.

    Args:
      images: selected images.
      fraction: `data.held_out` of the config.

    Returns:
      The training images, and those among which `validation.choose` chooses.

    Raises:
      ValueError: if all images are held out.
    """
    is_held = hold_out_of(images.records, fraction).mask(image.index for image in images.chosen)
    trained, held = np.flatnonzero(~is_held).tolist(), np.flatnonzero(is_held).tolist()
    if not trained:
        raise ValueError(
            f"all {len(images):,} images are held out with data.held_out={fraction}, and none is left to train the "
            "autoencoder; choose a smaller fraction or add images"
        )
    if fraction and not held:
        processes.log_on_main(
            f"none of {len(images):,} images is held out with data.held_out={fraction}: the autoencoder is validated "
            "on training images"
        )
    return images.subset(trained), images.subset(held or trained)


def drawn_pixels(images: SelectedImages, factor: int) -> Float[np.ndarray, "B H W c"]:
    """Images cropped to one common square, as large as possible, in [-1, 1].

    Args:
      images: images to draw.
      factor: pixels of a latent, of which the square's side is a multiple.
    """
    chosen = list(images)
    side = min(MAX_DRAWN_SIDE, *(size for image in chosen for size in image.shape[:2]))
    return np.stack([normalize(center_crop(image, side // factor * factor)) for image in chosen])
