"""Which records are held for validation: decided by the bytes of their pictures alone, hence the same in every stream,
area and stage, whatever else is selected."""

import hashlib

from data_pipeline.records.schema import Record


def check_held_out(fraction: float) -> None:
    """Raises a ValueError for a fraction of pictures that cannot be held out."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"held_out is {fraction}; it is the fraction of pictures kept from training, at least 0 (none) and below 1"
        )


def number(image: bytes) -> float:
    """A picture's own number in [0, 1), uniform over pictures: the first 48 bits of the SHA-256 of its bytes."""
    return int.from_bytes(hashlib.sha256(image).digest()[:6], "big") / 2**48


def is_held(record: Record, fraction: float) -> bool:
    """Whether the target or a condition image has a number below the fraction.

    So a picture below it is nowhere trained on: neither by itself, nor as a source or a target of any edit. The other
    pictures of a held edit may be. A larger fraction holds what a smaller one holds, and more.
    """
    return fraction > 0 and any(number(image) < fraction for image in (record.image, *record.conditions))
