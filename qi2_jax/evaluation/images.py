"""The images of an evaluation: read from a folder one by one, cropped, and grouped into batches of equal size."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.funnel import Tally
from data_pipeline.records.schema import MAX_IMAGE_BYTES, Record
from data_pipeline.records.shards import RecordFolder, digest_of
from data_pipeline.samples.held_out import HoldOut, hold_out_of
from data_pipeline.sources.base import DEFAULTS, Ledger, Refused, check_image
from data_pipeline.sources.records import PATTERNS, read_records
from data_pipeline.sources.tree import Files, walk
from qi2_jax.pixels import over_white

BATCH_PIXELS = 8 * 256 * 256  # an image with more pixels is a batch of its own
TEXT = "text"  # category of text pages


@dataclasses.dataclass(frozen=True)
class Item:
    """An image: its name, its category, and its pixels over white, cropped."""

    name: str
    category: str
    pixels: UInt8[np.ndarray, "H W 3"]

    @property
    def resolution(self) -> str:
        """The power of two nearest, in logarithms, to the side of a square of the same area, as in `256p`."""
        area = self.pixels.shape[0] * self.pixels.shape[1]
        return f"{1 << math.floor(math.log2(area) / 2 + 0.5)}p"


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of records, or of image files at any depth.

    Attributes:
      folder: the folder. The category of a file is the subfolder of `folder` that it lies in.
      multiple: sides are cropped to multiples of this, about the center.
      max_side: sides are cropped to at most this.
      side: if given, images are first resized so that their shorter side is this, and cropped to a square.
      held_out: if above 0, only records that training with this `data.held_out` holds out are read.
      is_training: with `held_out`, the other records are read instead, and all files of a folder of image files.

    Raises:
      ValueError: if the folder does not exist or has no records to hold out, or `side` or `max_side` do not fit
        `multiple`.
    """

    folder: Path
    multiple: int
    max_side: int
    side: int | None = None
    held_out: float = 0.0
    is_training: bool = False

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; give a folder of images or of records")
        if self.max_side < self.multiple:
            raise ValueError(f"--max-side is {self.max_side}; the models need at least {self.multiple} pixels")
        if self.side is not None and (self.side % self.multiple or not self.multiple <= self.side <= self.max_side):
            raise ValueError(
                f"--side is {self.side}; it must be a multiple of {self.multiple}, as the sides of all measured images "
                f"are, and at most --max-side {self.max_side}"
            )
        if self.held_out and not self.is_training and not self._has_records:
            raise ValueError(f"{self.folder} has no records, from which --held-out {self.held_out} could choose")

    @functools.cached_property
    def hold_out(self) -> HoldOut:
        """The hold-out rule of a folder of records."""
        return hold_out_of(RecordFolder(self.folder), self.held_out)

    @property
    def digest(self) -> str | None:
        """The hash of all records of the folder; None for image files."""
        return digest_of(RecordFolder(self.folder).shards) if self._has_records else None

    @functools.cached_property
    def _has_records(self) -> bool:
        return any(next(self.folder.glob(pattern), None) for pattern in PATTERNS)

    def read(self, refused: Tally, progress: str) -> Iterator[Item]:
        """Yields the images that can be decoded.

        Args:
          refused: receives the others, by reason.
          progress: title of the progress bar.

        Raises:
          ValueError: if there are none, with the reasons of the others.
        """
        count = 0
        with tqdm(desc=progress, unit="image", dynamic_ncols=True) as bar:
            ledger = Ledger(bar, refused=refused)
            for name, category, data in self._files(ledger):
                try:
                    item = Item(name, category, self._crop(over_white(decode_image(data).image)))
                except UndecodableImage as error:
                    refused.add(error.reason, name)
                except Refused as error:
                    ledger.refuse(error, name)
                else:
                    count += 1
                    yield item
        if not count:
            part = "training" if self.is_training else "held-out"
            kind = f"{part} image (--held-out {self.held_out})" if self.held_out and self._has_records else "image"
            raise ValueError(f"no {kind} in {self.folder} could be read; refused: {refused.counts or 'none'}")

    def _files(self, ledger: Ledger) -> Iterator[tuple[str, str, bytes]]:
        """Name, category and bytes of every image."""
        if self._has_records:
            for record in self._chosen(ledger) if self.held_out else read_records(self.folder, DEFAULTS, ledger):
                yield record.key, category_of(record), record.image
            return
        tree = walk(self.folder, ledger)
        files = Files(tree.root)
        for archive in tree.archives:
            ledger.refuse(Refused("not_read", "`qi2 data ingest` makes a folder of records of it"), archive)
        ledger.bar.total = len(tree.images)
        for image in tree.images:
            ledger.bar.update()
            try:
                data = check_image(files.read(image.key, MAX_IMAGE_BYTES, "too_large"), MAX_IMAGE_BYTES)
            except Refused as refusal:
                ledger.refuse(refusal, image.key)
                continue
            yield image.key, image.key.split("/")[0] if "/" in image.key else tree.root.name, data

    def _chosen(self, ledger: Ledger) -> Iterator[Record]:
        """The held-out records or, for training, the others."""
        records = self.hold_out.records
        ledger.bar.total = len(records)
        for index in range(len(records)):
            ledger.bar.update()
            try:
                record = records[index] if self.hold_out.holds(index) != self.is_training else None
            except ValueError as error:
                ledger.refuse("broken_file", str(error)[:200])
                continue
            if record is not None:
                yield record

    def _crop(self, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        if self.side is not None:
            image = _square(image, self.side)
        limit = self.max_side if self.side is None else self.side
        width, height = (min(length, limit) // self.multiple * self.multiple for length in image.size)
        if not width or not height:
            raise Refused("too_small", f"{image.width} x {image.height} pixels, below {self.multiple}")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))


def _square(image: Image.Image, side: int) -> Image.Image:
    """The central square of the image that is resized to a shorter side of `side`.

    Only this square is computed: a narrow image as a whole could need more memory than there is. The result differs
    from a crop of the whole in few pixels and by 1 of 255, because Pillow stores the box in single precision; and more
    for images above 100 times as tall as wide, which Pillow resizes in another order.
    """
    spans = []
    for length in image.size:
        resized = max(side, round(length * side / min(image.size)))
        first = (resized - side) // 2
        spans.append((first * length / resized, min(length, (first + side) * length / resized)))
    (left, right), (top, bottom) = spans
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def category_of(record: Record) -> str:
    """`TEXT` if a tag or the kind of a caption says so, otherwise the first part of the first tag or the data set.

    The tag `synthetic/text` marks drawn text, and captions of the kind `text` quote the writing in an image.
    """
    parts = [part for tag in record.tags for part in tag.split("/")]
    if "text" in parts or any(caption.kind == "text" for caption in record.captions):
        return TEXT
    return parts[0] if parts else record.source


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups consecutive images of one size, with at most `BATCH_PIXELS` pixels in a batch of several."""
    for shape, group in itertools.groupby(items, key=lambda item: item.pixels.shape):
        size = max(1, BATCH_PIXELS // (shape[0] * shape[1]))
        while batch := list(itertools.islice(group, size)):
            yield batch
