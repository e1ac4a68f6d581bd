"""Selected records as pixels: whole images in their buckets, with the places of their text.

Dims: `H` `W` pixels, `c` image channels, `n` lines of text.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from data_pipeline.buckets import Bucket, crop_box
from data_pipeline.decoding.images import decode_image
from data_pipeline.records.schema import Caption, Line, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.prepare import prepare_image


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


class TextImage(NamedTuple):
    """An image with its text.

    Attributes:
      pixels: values 0..255.
      lines_n4: boxes of the lines of text in it (left, top, right, bottom), in pixels.
    """

    pixels: UInt8[np.ndarray, "H W c"]
    lines_n4: Int[np.ndarray, "n 4"] = np.zeros((0, 4), np.int64)


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
        return self.with_text(index).pixels

    def with_text(self, index: int) -> TextImage:
        """The pixels of an image, and the boxes of the lines of text that its record names."""
        record, bucket = self.record(index), self.chosen[index].bucket
        image = decode_image(record.image).image
        return TextImage(prepare_image(image, bucket, self.channels), _boxes(record.lines, image.size, bucket))


@dataclasses.dataclass(frozen=True)
class TextImages(Sequence):
    """Selected images with their text, decoded on access.

    Attributes:
      images: selected images.
    """

    images: SelectedImages

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> TextImage:  # type: ignore[override]  # no slices
        return self.images.with_text(index)


def _boxes(lines: Sequence[Line], size: tuple[int, int], bucket: Bucket) -> Int[np.ndarray, "n 4"]:
    """The boxes of lines after `prepare_image`; those outside the bucket are left out.

    Args:
      lines: lines of the original image.
      size: width and height of the original image.
      bucket: bucket that it is resized to.
    """
    boxes_n4 = np.asarray([line.box for line in lines], float).reshape(-1, 4)
    left, top, right, bottom = crop_box(*size, bucket)
    scale = np.asarray([bucket.width / (right - left), bucket.height / (bottom - top)] * 2)
    placed_n4 = (boxes_n4 - [left, top] * 2) * scale
    outward_n4 = np.concatenate([np.floor(placed_n4[:, :2]), np.ceil(placed_n4[:, 2:])], axis=1)
    clipped_n4 = np.clip(outward_n4, 0, [bucket.width, bucket.height] * 2).astype(np.int64)
    return clipped_n4[(clipped_n4[:, :2] < clipped_n4[:, 2:]).all(1)]


def center_crop(image: UInt8[np.ndarray, "H W c"], side: int) -> UInt8[np.ndarray, "_ _ c"]:
    """The square of `side` pixels in the middle of an image."""
    top, left = ((size - side) // 2 for size in image.shape[:2])
    return image[top : top + side, left : left + side]
