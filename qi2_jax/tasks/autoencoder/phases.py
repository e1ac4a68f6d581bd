"""The crops of the phases of training: their sizes, and the images of each kind that are large enough."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from data_pipeline.loading.crop_batches import CropStream, Phase, Phases
from data_pipeline.loading.crops import SelectedImages, TextImage, TextImages
from data_pipeline.loading.kinds import split_by_kind
from qi2_jax.runtime import processes
from qi2_jax.tasks.autoencoder.config import AutoencoderConfig, PhaseConfig

MAX_CACHED_BYTES = 1 << 30  # images that take no more memory than this are decoded once
MAX_FREQUENCY = 8  # turns in a cycle of a size that the most images fit; sizes with at most half a turn are left out
SEEDS_OF_PHASE = 1_000  # seeds that the streams of a phase may use

Size = tuple[int, int]  # height and width


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
    if missing := [_described(kind, config.kinds[kind]) for kind in shares if not len(by_kind[kind])]:
        raise ValueError(
            f"{f'vae.later_phases.{name}.shares' if name else 'vae.shares'} has a share for {' and '.join(missing)}, "
            f"but 0 of the {len(images):,} selected training images of {images.records.folder} are of this kind; set "
            "the share to 0, or add such images"
        )
    title = f"vae.later_phases.{name}" if name else "the first phase"
    of_kinds = {kind: by_kind[kind] for kind in shares}
    fitting = _fitting(title, phase, of_kinds, images)
    frequencies = _frequencies(title, fitting, of_kinds, shares)
    seed = config.seed + SEEDS_OF_PHASE * number
    streams: list[tuple[CropStream, ...]] = []
    for size in frequencies:
        first = seed + 2 * len(streams) * len(shares)
        streams.append(
            tuple(
                CropStream(
                    pixels,
                    of_kind,
                    size,
                    first + 2 * place,
                    config.mattes,
                    config.crop_step,
                    0.0 if kind in config.unmirrored_kinds else config.mirrored,
                )
                for place, (kind, of_kind) in enumerate(zip(shares, fitting[size], strict=True))
            )
        )
    turns = _reduced(frequencies.values())
    return Phase(phase.start, tuple(streams), _reduced(shares.values()), turns, phase.batch_size, seed, rows)


def _described(kind: str, prefixes: Sequence[str]) -> str:
    labels = " or ".join(map(repr, prefixes))
    return f"the kind {kind!r} ({f'labels that begin with {labels}' if prefixes else 'images of no other kind'})"


def _fitting(
    title: str, phase: PhaseConfig, of_kinds: Mapping[str, np.ndarray], images: SelectedImages
) -> dict[Size, list[np.ndarray]]:
    """For each size of the crops that images of every kind fit, the images of each kind that are not smaller.

    Raises:
      ValueError: if every size is too large for all images of some kind.
    """
    heights, widths = (
        np.asarray([getattr(image.bucket, side) for image in images.chosen]) for side in ("height", "width")
    )
    fitting: dict[Size, list[np.ndarray]] = {}
    without: list[str] = []
    for height, width in phase.sizes:
        indices = [of_kind[(heights[of_kind] >= height) & (widths[of_kind] >= width)] for of_kind in of_kinds.values()]
        lacking = [
            f"0 of {len(of_kind):,} images{f' of the kind {kind!r}' if kind else ''}"
            for (kind, of_kind), found in zip(of_kinds.items(), indices, strict=True)
            if not len(found)
        ]
        if lacking:
            without.append(f"{width}x{height} pixels, because {' and '.join(lacking)} are as large")
        else:
            fitting[height, width] = indices
    if not fitting:
        raise ValueError(
            f"{title} has no crops of {'; or of '.join(without)}. Choose smaller crops or more ratios, or add larger "
            "images"
        )
    for reason in without:
        processes.log_on_main(f"{title} has no crops of {reason}")
    return fitting


def _frequencies(
    title: str, fitting: Mapping[Size, list[np.ndarray]], of_kinds: Mapping[str, np.ndarray], shares: Mapping[str, int]
) -> dict[Size, int]:
    """The turns of each size, in proportion to the images that it fits; rare sizes are left out.

    Args:
      title: name of the phase in messages.
      fitting: images of each kind that are large enough for a size.
      of_kinds: images of each kind.
      shares: weight of each kind's images.
    """
    coverage = {
        size: sum(
            share * len(found) / len(of_kind)
            for share, found, of_kind in zip(shares.values(), indices, of_kinds.values(), strict=True)
        )
        for size, indices in fitting.items()
    }
    turns = {size: round(MAX_FREQUENCY * covered / max(coverage.values())) for size, covered in coverage.items()}
    total = sum(map(len, of_kinds.values()))
    for height, width in [size for size in turns if not turns[size]]:
        count = sum(map(len, fitting[height, width]))
        processes.log_on_main(
            f"{title} has no crops of {width}x{height} pixels, because only {count:,} of {total:,} images are as large"
        )
    turns = {size: number for size, number in turns.items() if number}
    used = np.unique(np.concatenate([found for size in turns for found in fitting[size]]))
    if len(used) < total:
        processes.log_on_main(
            f"{title}: {total - len(used):,} of {total:,} images are smaller than its crops and not used"
        )
    return turns


def _reduced(weights: Iterable[int]) -> tuple[int, ...]:
    weights = tuple(weights)
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)
