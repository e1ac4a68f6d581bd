"""Selected records as pixels: whole pictures in their buckets, and random crops for training the autoencoder."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Float, UInt8

from data_pipeline.buckets import Bucket
from data_pipeline.decoding.images import decode_image
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.prepare import prepare_image
from qi2_jax.pixels import normalize


@dataclasses.dataclass(frozen=True)
class Picture:
    """One selected record: its position in a `RecordFolder`, the bucket it goes to, and which captions to use."""

    index: int
    bucket: Bucket
    captions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pictures(Sequence):
    """Pixels of selected records, decoded when asked for.

    Attributes:
      records: where they are.
      chosen: which, in order.
      channels: 3 or 4, see `prepare.prepare_image`.
    """

    records: RecordFolder
    chosen: tuple[Picture, ...]
    channels: int = 4

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def digest(self) -> str:
        """Changes with the stored images, their choice, and how they are prepared."""
        total = hashlib.sha256(repr((self.chosen, self.channels)).encode())
        for shard in self.records.shards:
            total.update(shard.digest.encode())
        return total.hexdigest()

    @property
    def nbytes(self) -> int:
        """Memory that all decoded pictures take."""
        return sum(picture.bucket.width * picture.bucket.height * self.channels for picture in self.chosen)

    def record(self, index: int) -> Record:
        return self.records[self.chosen[index].index]

    def captions(self, index: int) -> list[Caption]:
        """The selected captions of a picture."""
        captions = self.record(index).captions
        return [captions[position] for position in self.chosen[index].captions]

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W c"]:  # type: ignore[override]  # no slices
        image = decode_image(self.record(index).image).image
        return prepare_image(image, self.chosen[index].bucket, self.channels)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Random square crops of pictures, mirrored half of the time: a pure function of (seed, step).

    Attributes:
      pictures: pixels 0..255; each side at least `side`.
      side: of a crop, in pixels.
      batch_size: global number of crops per step.
      seed: of order, place and mirroring.
      rows: which rows of the global batch to make, those of this process; None: all.
    """

    pictures: Sequence[UInt8[np.ndarray, "H W c"]]
    side: int
    batch_size: int
    seed: int
    rows: Sequence[int] | None = None

    def from_step(self, start: int) -> Iterator[Float[np.ndarray, "B H W c"]]:
        """Pixels in [-1, 1] for steps start, start + 1, ..."""
        order = grain.MapDataset.range(len(self.pictures)).seed(self.seed).shuffle().repeat()
        crops = order.random_map(self._crop, seed=self.seed + 1)
        rows = range(self.batch_size) if self.rows is None else self.rows

        def batch(step: int):
            return np.stack([crops[step * self.batch_size + row] for row in rows])

        steps = grain.MapDataset.range(start, np.iinfo(np.int64).max).map(batch)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def _crop(self, index: int, rng: np.random.Generator) -> Float[np.ndarray, "H W c"]:
        pixels = self.pictures[index]
        top, left = (int(rng.integers(0, size - self.side + 1)) for size in pixels.shape[:2])
        crop = pixels[top : top + self.side, left : left + self.side]
        return normalize(crop[:, ::-1] if rng.random() < 0.5 else crop)
