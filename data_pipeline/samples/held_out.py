"""Which records are held out for validation.

The bytes of a record's images alone decide. The decision is the same in every stream, area and stage, whatever else is
selected.
"""

import hashlib

from data_pipeline.records.schema import Record


def check_held_out(fraction: float) -> None:
    """Raises a ValueError for a fraction of images that cannot be held out."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"held_out is {fraction}; it is the fraction of images held out from training; choose at least 0 "
            "(none) and less than 1"
        )


def number(image: bytes) -> float:
    """A hash of an image in [0, 1), uniform over images: the first 48 bits of the SHA-256 of its bytes."""
    return int.from_bytes(hashlib.sha256(image).digest()[:6], "big") / 2**48


def is_held(record: Record, fraction: float) -> bool:
    """Whether the number of the target or of a condition image is below the fraction.

    Training therefore never sees such an image, neither alone nor as source or target of an edit. It may see the other
    images of an edit that is held out. A larger fraction includes everything that a smaller one holds out.
    """
    return fraction > 0 and any(number(image) < fraction for image in (record.image, *record.conditions))
