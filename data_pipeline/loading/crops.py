"""Selected records as pixels: whole images in their buckets, and random crops for training the autoencoder.

Dims: `B` batch, `H` `W` pixels, `c` image channels.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Float, UInt8

from data_pipeline.buckets import Bucket
from data_pipeline.decoding.images import decode_image
from data_pipeline.loading.mattes import with_matte
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.prepare import prepare_image
from qi2_jax.pixels import normalize


@dataclasses.dataclass(frozen=True)
class SelectedImage:
    """The image of one selected record, in its bucket.

    Attributes:
      index: position of the record in its `RecordFolder`.
      bucket: bucket that the image is resized to.
      captions: indices of the captions to use.
    """

    index: int
    bucket: Bucket
    captions: tuple[int, ...]

    def __repr__(self) -> str:  # enters `SelectedImages.digest`, so runs that exist fix its form
        return f"Picture(index={self.index!r}, bucket={self.bucket!r}, captions={self.captions!r})"


@dataclasses.dataclass(frozen=True)
class SelectedImages(Sequence):
    """Pixels of selected records, decoded on access.

    Attributes:
      records: folder of all records.
      chosen: selected records, in order.
      channels: number of image channels, 3 or 4; see `prepare.prepare_image`.
    """

    records: RecordFolder
    chosen: tuple[SelectedImage, ...]
    channels: int = 4

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def digest(self) -> str:
        """A hash of the stored images, their selection and their preparation."""
        total = hashlib.sha256(repr((self.chosen, self.channels)).encode())
        for shard in self.records.shards:
            total.update(shard.digest.encode())
        return total.hexdigest()

    @property
    def nbytes(self) -> int:
        """Memory of all decoded images, in bytes."""
        return sum(image.bucket.width * image.bucket.height * self.channels for image in self.chosen)

    def record(self, index: int) -> Record:
        return self.records[self.chosen[index].index]

    def subset(self, indices: Sequence[int]) -> "SelectedImages":
        """Some of the images, in the given order."""
        return dataclasses.replace(self, chosen=tuple(self.chosen[index] for index in indices))

    def captions(self, index: int) -> list[Caption]:
        """Selected captions of an image."""
        captions = self.record(index).captions
        return [captions[position] for position in self.chosen[index].captions]

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W c"]:  # type: ignore[override]  # no slices
        image = decode_image(self.record(index).image).image
        return prepare_image(image, self.chosen[index].bucket, self.channels)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random square crops of images: a pure function of (seed, step).

    Attributes:
      images: images with values 0..255 and sides of at least `side`.
      side: side of a crop, in pixels.
      batch_size: global number of crops per step.
      seed: seed of the order, positions and mirroring.
      rows: rows of the global batch that this process reads; None for all.
      mattes: share of crops whose alpha is multiplied by a random matte; above 0, images need four channels.
      step: number of pixels of which the positions of crops are multiples.
      mirrored: share of crops that are mirrored.
    """

    images: Sequence[UInt8[np.ndarray, "_ _ c"]]
    side: int
    batch_size: int
    seed: int
    rows: Sequence[int] | None = None
    mattes: float = 0.0
    step: int = 1
    mirrored: float = 0.5

    def from_step(self, start: int) -> Iterator[Float[np.ndarray, "B H W c"]]:
        """Pixels in [-1, 1] for steps start, start + 1, ..."""
        order = grain.MapDataset.range(len(self.images)).seed(self.seed).shuffle().repeat()
        crops = order.random_map(self._crop, seed=self.seed + 1)
        rows = range(self.batch_size) if self.rows is None else self.rows

        def batch(step: int) -> Float[np.ndarray, "B H W c"]:
            return np.stack([crops[step * self.batch_size + row] for row in rows])

        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def _crop(self, index: int, rng: np.random.Generator) -> Float[np.ndarray, "H W c"]:
        pixels = self.images[index]
        top, left = (self.step * int(rng.integers(0, (size - self.side) // self.step + 1)) for size in pixels.shape[:2])
        crop = pixels[top : top + self.side, left : left + self.side]
        crop = crop[:, ::-1] if rng.random() < self.mirrored else crop
        if self.mattes and rng.random() < self.mattes:  # without mattes, nothing more is drawn than in earlier versions
            crop = with_matte(crop, rng)
        return normalize(crop)


def center_crop(image: UInt8[np.ndarray, "H W c"], side: int) -> UInt8[np.ndarray, "_ _ c"]:
    """The square of `side` pixels in the middle of an image."""
    top, left = ((size - side) // 2 for size in image.shape[:2])
    return image[top : top + side, left : left + side]
