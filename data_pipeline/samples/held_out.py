"""Which records are held out for validation, in every stream, area, stage and task.

`qi2 data score` gives each record a number that its copies and edits share (`scoring.hold_out`). Without these numbers,
the bytes of a record's images decide, and a re-encoded copy of a held-out image may be trained on.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.scoring import hold_out

BY_IMAGES = "images"  # rule of caches that record no rule
_BY_GROUPS = "near-duplicate groups "

log = logging.getLogger(__name__)


def check_held_out(fraction: float) -> None:
    """Raises a ValueError unless 0 <= fraction < 1."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"held_out is {fraction}; it is the fraction of images held out from training; choose at least 0 "
            "(none) and less than 1"
        )


def image_hash(image: bytes) -> float:
    """A hash of an image in [0, 1), uniform over images: the first 48 bits of the SHA-256 of its bytes."""
    return int.from_bytes(hashlib.sha256(image).digest()[:6], "big") / 2**48


def is_held(record: Record, fraction: float) -> bool:
    """Whether the hash of the record's target or of a condition image is below the fraction: the rule `BY_IMAGES`.

    Training may see the other images of a held-out edit.
    """
    return fraction > 0 and any(image_hash(image) < fraction for image in (record.image, *record.conditions))


@dataclass(frozen=True)
class HoldOut:
    """The hold-out rule of a folder. A larger fraction holds out everything that a smaller one does.

    Attributes:
      records: folder of the records.
      fraction: fraction that is held out, 0 <= fraction < 1.
      numbers: hold-out number of each record; None for the rule `BY_IMAGES`.
    """

    records: RecordFolder
    fraction: float
    numbers: Float[np.ndarray, " n"] | None = None

    @property
    def rule(self) -> str:
        """The name of the rule, with a digest of its numbers. Caches record it."""
        if self.numbers is None:
            return BY_IMAGES
        return _BY_GROUPS + hashlib.sha256(self.numbers.astype("<f8").tobytes()).hexdigest()[:16]

    def holds(self, index: int, record: Record | None = None) -> bool:
        """Whether a record is held out.

        Args:
          index: position of the record in its folder.
          record: this record, if the caller has read it.
        """
        if not self.fraction:
            return False
        if self.numbers is not None:
            return bool(self.numbers[index] < self.fraction)
        return is_held(self.records[index] if record is None else record, self.fraction)

    def mask(self, indices: Iterable[int]) -> Bool[np.ndarray, " k"]:
        """Whether each record is held out. Without numbers, this reads the records."""
        if self.numbers is not None:
            return self.numbers[np.fromiter(indices, np.int64)] < self.fraction
        return np.fromiter(map(self.holds, indices), bool)


def hold_out_of(records: RecordFolder, fraction: float, rule: str | None = None) -> HoldOut:
    """The hold-out rule of a folder: by groups of near duplicates if they are scored, else by images.

    Args:
      records: folder of the records.
      fraction: fraction that is held out.
      rule: rule that earlier caches recorded, which is used again; None if there are none.

    Raises:
      ValueError: if the fraction is invalid, or the recorded rule used other groups than those that are scored now.
    """
    check_held_out(fraction)
    if not fraction or rule == BY_IMAGES:
        return HoldOut(records, fraction)
    if hold_out.is_complete(records.folder):
        found = HoldOut(records, fraction, hold_out.read_numbers(records.folder))
    else:
        found = HoldOut(records, fraction)
    if rule is not None and found.rule != rule:
        raise ValueError(
            f"{records.folder}: earlier samples were held out by {rule}, but now {found.rule} would decide, and "
            "training would see held-out images; restore the scores of then, or encode all samples into new folders"
        )
    if found.numbers is None:
        log.warning(
            "%s has no groups of near duplicates, so held-out images are chosen by their bytes and copies of them may "
            "be trained on; `qi2 data score %s` finds the groups",
            records.folder,
            records.folder,
        )
    return found
