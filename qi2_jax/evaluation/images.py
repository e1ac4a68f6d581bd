"""The images of an evaluation: read from a folder one by one, cropped, and grouped into batches of equal size."""

import dataclasses
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
from data_pipeline.sources.base import DEFAULTS, Ledger, Refused, check_image
from data_pipeline.sources.records import PATTERNS, read_records
from data_pipeline.sources.tree import Files, walk
from qi2_jax.pixels import over_white

BATCH_PIXELS = 8 * 256 * 256  # an image with more pixels is a batch of its own
OTHER = "other"  # category of records without a tag or caption that names one


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

    Raises:
      ValueError: if the folder does not exist, or `side` or `max_side` do not fit `multiple`.
    """

    folder: Path
    multiple: int
    max_side: int
    side: int | None = None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder; give a folder of images or of records")
        if self.max_side < self.multiple:
            raise ValueError(f"--max-side is {self.max_side}; the models need at least {self.multiple} pixels")
        if self.side is not None and (self.side % self.multiple or not self.multiple <= self.side <= self.max_side):
            raise ValueError(
                f"--side is {self.side}; it must be a multiple of {self.multiple}, the largest patch of the models, "
                f"and at most --max-side {self.max_side}"
            )

    def read(self, refused: Tally, progress: str) -> Iterator[Item]:
        """Yields the images that can be decoded.

        Args:
          refused: receives the others, by reason.
          progress: title of the progress bar.
        """
        with tqdm(desc=progress, unit="image", dynamic_ncols=True) as bar:
            ledger = Ledger(bar, refused=refused)
            for name, category, data in self._files(ledger):
                try:
                    yield Item(name, category, self._crop(over_white(decode_image(data).image)))
                except UndecodableImage as error:
                    refused.add(error.reason, name)
                except Refused as error:
                    ledger.refuse(error, name)

    def _files(self, ledger: Ledger) -> Iterator[tuple[str, str, bytes]]:
        """Name, category and bytes of every image."""
        if any(next(self.folder.glob(pattern), None) for pattern in PATTERNS):
            for record in read_records(self.folder, DEFAULTS, ledger):
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

    def _crop(self, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        if self.side is not None:
            scale = self.side / min(image.size)
            size = tuple(max(self.side, round(length * scale)) for length in image.size)
            image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        limit = self.max_side if self.side is None else self.side
        width, height = (min(length, limit) // self.multiple * self.multiple for length in image.size)
        if not width or not height:
            raise Refused("too_small", f"{image.width} x {image.height} pixels, below {self.multiple}")
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))


def category_of(record: Record) -> str:
    """`text` if a tag or the kind of a caption says so, otherwise the first part of the first tag.

    The tag `synthetic/text` marks drawn text, and captions of the kind `text` quote the writing in an image.
    """
    parts = [part for tag in record.tags for part in tag.split("/")]
    if "text" in parts or any(caption.kind == "text" for caption in record.captions):
        return "text"
    return parts[0] if parts else OTHER


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups consecutive images of one size, with at most `BATCH_PIXELS` pixels in a batch of several."""
    for shape, group in itertools.groupby(items, key=lambda item: item.pixels.shape):
        size = max(1, BATCH_PIXELS // (shape[0] * shape[1]))
        while batch := list(itertools.islice(group, size)):
            yield batch
