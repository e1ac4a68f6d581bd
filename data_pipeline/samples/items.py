"""Items to encode: selected records, their buckets, and their pixels as the encoders read them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from data_pipeline.buckets import Bucket, Resolutions
from data_pipeline.decoding.images import decode_image
from data_pipeline.funnel import Tally
from data_pipeline.records.shards import RecordFolder
from data_pipeline.samples.held_out import HoldOut
from data_pipeline.samples.prepare import prepare_image
from data_pipeline.samples.schema import Text
from data_pipeline.selection.index import Kept


@runtime_checkable
class Encoders(Protocol):
    """Encoders of images and prompts; see `qi2_jax.inference.encoders`.

    Attributes:
      channels: image channels that the autoencoder reads.
      online: features that training computes itself, see `schema.ONLINE`; samples contain prompts and pixels instead.
    """

    channels: int
    online: str

    def images_at_once(self, width: int, height: int) -> int: ...

    def latents(self, images: Sequence[UInt8[np.ndarray, "_ _ c"]]) -> list[Float[np.ndarray, "_ _ C"]]: ...

    def texts(
        self, texts: Sequence[str], images: Sequence[Sequence[UInt8[np.ndarray, "_ _ c"]]], max_patches: int = 0
    ) -> list[Text]: ...


@dataclass(frozen=True)
class Item:
    """A selected record to encode for one area."""

    kept: Kept
    side: int
    bucket: Bucket


@dataclass(frozen=True)
class Pixels:
    """An item with its images as the encoders read them.

    Attributes:
      held: whether it is held out for validation.
      left_out: reason why it cannot be used; None if it can.
    """

    item: Item
    target: UInt8[np.ndarray, "H W c"] | None
    conditions: tuple[UInt8[np.ndarray, "_ _ c"], ...]
    texts: tuple[str, ...]
    held: bool
    left_out: str | None = None


@dataclass(frozen=True)
class ItemPreparer:
    """Groups selected records into batches of items, and decodes and crops their images.

    Attributes:
      held_out: rule that decides which records are held out.
    """

    records: RecordFolder
    resolutions: Resolutions
    encoders: Encoders
    held_out: HoldOut

    def prepare(self, batch: Sequence[Item]) -> list[Pixels]:
        """Decodes and crops the images of a batch."""
        return [self._prepare(item) for item in batch]

    def _prepare(self, item: Item) -> Pixels:
        record = self.records[item.kept.index]
        if record.key != item.kept.key:
            raise ValueError(
                f"{self.records.folder}: record {item.kept.index} is {record.key!r}, but {item.kept.key!r} was "
                "selected; select again"
            )
        texts = tuple(record.captions[position].text for position in item.kept.captions)
        held = self.held_out.holds(item.kept.index, record)
        target = prepare_image(decode_image(record.image).image, item.bucket, self.encoders.channels)
        conditions = []
        for data in record.conditions:
            image = decode_image(data).image
            fit = self.resolutions.buckets(item.side).fit(*image.size)
            if fit.left_out is not None:
                return Pixels(item, None, (), texts, held, f"condition_{fit.left_out}")
            conditions.append(prepare_image(image, fit.bucket, self.encoders.channels))
        return Pixels(item, target, tuple(conditions), texts, held)

    def batches(self, selected: Sequence[Kept], left_out: Tally) -> list[list[Item]]:
        """Batches of items; those of a batch share the bucket and the number of condition images."""
        items = []
        for row in selected:
            if not row.captions:  # selected for the autoencoder, see `select`
                left_out.add("no_caption", row.key)
                continue
            fits = self.resolutions.fits(row.width, row.height)
            items += [Item(row, side, fit.bucket) for side, fit in fits if fit.left_out is None]
            for _, fit in fits:
                if fit.left_out is not None:
                    left_out.add(fit.left_out, row.key)
        items.sort(key=lambda item: (item.side, item.kept.conditions, str(item.bucket), item.kept.index))
        batches: list[list[Item]] = []
        for _, group in itertools.groupby(items, key=lambda item: (item.side, item.kept.conditions, item.bucket)):
            alike = list(group)
            size = self.encoders.images_at_once(alike[0].bucket.width, alike[0].bucket.height)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
        return batches
