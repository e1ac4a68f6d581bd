"""Which records are held out for validation.

The decision depends on the bytes of a record's images alone, so it is the same in every stream, area and stage.
"""

import hashlib

from data_pipeline.records.schema import Record


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
    """Whether the hash of the record's target or of a condition image is below the fraction.

    Training therefore never sees such an image, neither alone nor as source or target of an edit. It may see the other
    images of a held-out edit. A larger fraction holds out everything that a smaller one does.
    """
    return fraction > 0 and any(image_hash(image) < fraction for image in (record.image, *record.conditions))
