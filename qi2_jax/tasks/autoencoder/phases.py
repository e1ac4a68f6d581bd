"""The crops of the phases of training: their sizes, and the images of each kind that are large enough."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data_pipeline.loading.crop_batches import CropStream, Phase, Phases
from data_pipeline.loading.crops import SelectedImages, TextImage, TextImages
from data_pipeline.loading.kinds import split_by_kind
from qi2_jax.runtime import processes
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig, PhaseConfig

MAX_CACHED_BYTES = 1 << 30  # images that take no more memory than this are decoded once
MAX_FREQUENCY = 8  # turns of a size that the most images fit, in a cycle in which rare sizes have one
SEEDS_OF_PHASE = 1_000  # seeds that the streams of a phase may use


def make_phases(
    config: AutoencoderConfig, images: SelectedImages, local_rows: Callable[[int], Sequence[int]]
) -> Phases:
    """The crops of all phases.

    Args:
      config: config of the run.
      images: images to train on.
      local_rows: function from the size of a batch to the rows that this process reads.

    Raises:
      ValueError: if the images have no size, kind or score that a phase needs.
    """
    # Every image is cropped again and again: if there is room, it is decoded once.
    whole = TextImages(images)
    pixels: Sequence[TextImage] = list(whole) if images.nbytes <= MAX_CACHED_BYTES else whole
    by_kind = {kind: np.asarray(found, int) for kind, found in split_by_kind(images, config.kinds).items()}
    if without := len(images) - sum(map(len, by_kind.values())):
        processes.log_on_main(f"{without:,} of {len(images):,} images are of no kind in {[*by_kind]} and are not used")
    return Phases(
        tuple(
            _phase(config, name, images, pixels, by_kind, local_rows(phase.batch_size))
            for name, phase in config.phases.items()
        )
    )


def _phase(
    config: AutoencoderConfig,
    name: str,
    images: SelectedImages,
    pixels: Sequence[TextImage],
    by_kind: dict[str, np.ndarray],
    rows: Sequence[int],
) -> Phase:
    phase, number = config.phases[name], [*config.phases].index(name)
    shares = {kind: share for kind, share in phase.kind_shares.items() if share}
    if missing := [kind for kind in shares if not len(by_kind[kind])]:
        key = f"vae.later_phases.{name}.shares" if name else "vae.shares"
        raise ValueError(
            f"{key} has a share for the kinds {missing}, but {images.records.folder} has no selected training images "
            f"with labels of vae.kinds {[config.kinds[kind] for kind in missing]}; set the share to 0, or add such "
            "images"
        )
    fitting = _fitting(name, phase, {kind: by_kind[kind] for kind in shares}, images)
    seed = config.seed + SEEDS_OF_PHASE * number
    streams: list[tuple[CropStream, ...]] = []
    coverage: list[float] = []
    for size, indices in fitting.items():
        first = seed + 2 * len(streams) * len(shares)
        streams.append(
            tuple(
                CropStream(pixels, of_kind, size, first + 2 * place, config.mattes, config.crop_step, config.mirrored)
                for place, of_kind in enumerate(indices)
            )
        )
        coverage.append(
            sum(shares[kind] * len(of_kind) / len(by_kind[kind]) for kind, of_kind in zip(shares, indices, strict=True))
        )
    frequencies = [max(1, round(MAX_FREQUENCY * covered / max(coverage))) for covered in coverage]
    return Phase(
        phase.start, tuple(streams), _reduced(shares.values()), _reduced(frequencies), phase.batch_size, seed, rows
    )


def _fitting(
    name: str, phase: PhaseConfig, by_kind: dict[str, np.ndarray], images: SelectedImages
) -> dict[tuple[int, int], list[np.ndarray]]:
    """For each size of the crops, the images of each kind that are not smaller.

    Raises:
      ValueError: if there is no size that images of every kind fit.
    """
    heights, widths = (
        np.asarray([getattr(image.bucket, side) for image in images.chosen]) for side in ("height", "width")
    )
    title = f"vae.later_phases.{name}" if name else "the first phase"
    fitting = {
        (height, width): [
            of_kind[(heights[of_kind] >= height) & (widths[of_kind] >= width)] for of_kind in by_kind.values()
        ]
        for height, width in phase.sizes
    }
    used = {size: indices for size, indices in fitting.items() if all(map(len, indices))}
    sizes = {size: f"{size[1]}x{size[0]}" for size in fitting}
    if not used:
        raise ValueError(
            f"{title}: crops of {', '.join(sizes.values())} pixels fit no image, or not one of each kind in "
            f"{[*by_kind]}; choose smaller crops or more ratios, or add larger images"
        )
    if unused := [sizes[size] for size in fitting if size not in used]:
        processes.log_on_main(f"{title} has no crops of {', '.join(unused)}: no image of some kind is as large")
    count = sum(map(len, by_kind.values()))
    if small := count - len(np.unique(np.concatenate([of_kind for indices in used.values() for of_kind in indices]))):
        processes.log_on_main(f"{title}: {small:,} of {count:,} images are smaller than its crops and not used")
    return used


def _reduced(weights: Iterable[int]) -> tuple[int, ...]:
    weights = tuple(weights)
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)
