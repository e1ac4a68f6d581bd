"""Batches of random crops for training the autoencoder: a pure function of (seed, step), on any number of hosts.

The steps belong to phases. All crops of a batch have one size, and the sizes of a phase take turns from batch to batch.
Within the batches of a size, kinds of images take turns from row to row, and each kind has its own shuffled order.

Dims: `B` batch, `H` `W` pixels, `c` image channels, `n` lines of text.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float

from data_pipeline.loading.crops import TextImage
from data_pipeline.loading.mattes import with_matte
from data_pipeline.loading.text_crops import draw_corner
from data_pipeline.loading.turns import Turns
from qi2_jax.pixels import normalize


@dataclasses.dataclass(frozen=True)
class CropStream:
    """Endless random crops of one size. Crops of images with boxes of lines of text keep the lines whole.

    Every epoch is a new permutation of all images.

    Attributes:
      images: images, of which those in `indices` are not smaller than a crop.
      indices: positions of the images that are cropped.
      size: height and width of a crop, in pixels.
      seed: seed of the order; the next one is that of places, mirroring and mattes.
      mattes: share of crops whose alpha is multiplied by a random matte; above 0, images need four channels.
      step: number of pixels of which the positions of crops are multiples.
      mirrored: share of crops that are mirrored, but for images with boxes of lines of text, which never are.
    """

    images: Sequence[TextImage]
    indices: Sequence[int] | np.ndarray
    size: tuple[int, int]
    seed: int
    mattes: float = 0.0
    step: int = 1
    mirrored: float = 0.5

    def crops(self) -> grain.MapDataset:
        """Pixels in [-1, 1] of crop 0, 1, ..."""
        order = grain.MapDataset.range(len(self.indices)).seed(self.seed).shuffle().repeat()
        return order.random_map(self._crop, seed=self.seed + 1)

    def _crop(self, number: int, rng: np.random.Generator) -> Float[np.ndarray, "H W c"]:
        pixels, lines_n4 = self.images[int(self.indices[number])]
        if len(lines_n4):
            top, left = draw_corner(lines_n4, pixels.shape[:2], self.size, rng, self.step)
        else:
            spare = [size - side for size, side in zip(pixels.shape[:2], self.size, strict=True)]
            top, left = (self.step * int(rng.integers(0, most // self.step + 1)) for most in spare)
        crop = pixels[top : top + self.size[0], left : left + self.size[1]]
        if rng.random() < self.mirrored and not len(lines_n4):
            crop = crop[:, ::-1]
        if rng.random() < self.mattes:
            crop = with_matte(crop, rng)
        return normalize(crop)


class CropBatch(NamedTuple):
    """The rows of a batch that this process reads.

    Attributes:
      pixels_BHWc: crops, in [-1, 1].
      kinds: kind of each row, as the position of its stream.
    """

    pixels_BHWc: Float[np.ndarray, "B H W c"]
    kinds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training in which batches have one number of crops and few sizes.

    Attributes:
      start: first step of the phase, counted from 0.
      streams: for each size of the crops, a stream for each kind of images.
      shares: turns of each kind.
      frequencies: turns of each size.
      batch_size: global number of crops in a batch.
      seed: seed of the turns.
      rows: rows of the global batch that this process reads; None for all.
    """

    start: int
    streams: tuple[tuple[CropStream, ...], ...]
    shares: tuple[int, ...]
    frequencies: tuple[int, ...]
    batch_size: int
    seed: int
    rows: Sequence[int] | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each size."""
        return tuple(streams[0].size for streams in self.streams)

    def batch(self, number: int) -> CropBatch:
        """Batch 0, 1, ... of the phase."""
        size, number_of_size = self._sizes.turn(number)
        rows = range(self.batch_size) if self.rows is None else self.rows
        turns = [self._kinds.turn(number_of_size * self.batch_size + row) for row in rows]
        crops = [self._crops[size][kind][position] for kind, position in turns]
        return CropBatch(np.stack(crops), tuple(kind for kind, _ in turns))

    @functools.cached_property
    def _sizes(self) -> Turns:
        return Turns(self.frequencies, self.seed)

    @functools.cached_property
    def _kinds(self) -> Turns:
        return Turns(self.shares, self.seed + 1)

    @functools.cached_property
    def _crops(self) -> list[list[grain.MapDataset]]:
        return [[stream.crops() for stream in streams] for streams in self.streams]


@dataclasses.dataclass(frozen=True)
class Phases:
    """Phases of training, one after the other; the last one does not end.

    Attributes:
      phases: phases in the order of their first steps, the first of which is 0.
    """

    phases: tuple[Phase, ...]

    @property
    def used(self) -> list[int]:
        """Positions of the images that are cropped in any phase."""
        streams = [stream for phase in self.phases for streams in phase.streams for stream in streams]
        return np.unique(np.concatenate([np.asarray(stream.indices) for stream in streams])).tolist()

    def of_step(self, step: int) -> int:
        """The position of the phase to which a step belongs."""
        return bisect.bisect_right([phase.start for phase in self.phases], step) - 1

    def from_step(self, start: int) -> Iterator[CropBatch]:
        """The batches of steps start, start + 1, ...; threads read them ahead."""

        def batch(step: int) -> CropBatch:
            phase = self.phases[self.of_step(step)]
            return phase.batch(step - phase.start)

        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
