"""Duplicates: fingerprints of every image, and the grouping of equal ones.

The fingerprint is a score column like any other. Grouping needs all images at once and has thresholds, so `selection`
does it, over the images that passed the filters before: a copy that is too small never displaces the good one.

Two images are near duplicates when two independent comparisons agree. The 64-bit perceptual hash (signs of the lowest
DCT coefficients) proposes pairs; it collides on pictures with little in them. A grey thumbnail confirms: the *worst*
cell decides, because another word on the same poster changes few cells, but those by much. Measured on 24 pictures:
JPEG at quality 10 or half size changes the worst of 16 x 16 cells by at most 5 of 255 (11 on black-and-white drawings),
another letter in a rendered sign by 32 or more. One digit on a slide full of text changes 2, less than compression
does: no thumbnail can decide there, so pictures whose grey levels have little entropy (`filters.entropy`; flat
drawings, slides, text pages) are never called near duplicates, only exact ones.
"""

import base64
import hashlib
from collections.abc import Sequence

import imagehash
import numpy as np
from jaxtyping import Float, UInt8, UInt64
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter

THUMBNAIL = 16  # cells per side
_PAIRS_AT_ONCE, _CONFIRMED_AT_ONCE = 1 << 24, 1 << 16  # bound the memory of a comparison to some hundred megabytes


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `DUPLICATES` for each candidate."""
    return [_score(candidate) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    image = candidate.whole.image
    grey = candidate.grey
    pixels = hashlib.sha256(f"{image.mode} {image.width} {image.height}".encode())
    pixels.update(image.tobytes())
    return {
        "bytes_sha256": hashlib.sha256(candidate.record.image).hexdigest(),
        "pixels_sha256": pixels.hexdigest(),
        "phash": str(imagehash.phash(grey)),
        "thumbnail": base64.b64encode(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()).decode(),
    }


DUPLICATES = Filter(
    name="duplicates",
    version=2,
    columns={
        "bytes_sha256": (str, "of the file"),
        "pixels_sha256": (str, "of size and pixels after turning, equal for lossless copies in other formats"),
        "phash": (str, "64-bit perceptual hash, 16 hexadecimal digits"),
        "thumbnail": (str, f"{THUMBNAIL} x {THUMBNAIL} grey levels, base64"),
    },
    score=score,
)


def group_equal(values: Sequence[str]) -> list[int]:
    """For each position the first position with the same value."""
    first: dict[str, int] = {}
    return [first.setdefault(value, position) for position, value in enumerate(values)]


def parse_fingerprints(rows: Sequence[dict]) -> tuple[UInt64[np.ndarray, " n"], UInt8[np.ndarray, "n t"]]:
    """Hashes and thumbnails of score rows as arrays: [n] and [n, THUMBNAIL ** 2]."""
    hashes = np.array([int(row["duplicates.phash"], 16) for row in rows], dtype=np.uint64)
    pixels = b"".join(base64.b64decode(row["duplicates.thumbnail"]) for row in rows)
    return hashes, np.frombuffer(pixels, dtype=np.uint8).reshape(len(rows), THUMBNAIL**2)


def group_near(
    hashes: UInt64[np.ndarray, " n"],
    thumbnails: UInt8[np.ndarray, "n t"],
    entropies: Float[np.ndarray, " n"],
    *,
    max_distance: int,
    max_difference: int,
    min_entropy: float,
) -> list[int]:
    """For each position the first position of its group of near duplicates (itself when it is alone or first).

    Groups are the connected components of the pairs that differ in at most `max_distance` bits of the hash and at most
    `max_difference` grey levels in every thumbnail cell, both with an entropy of at least `min_entropy` bits. All pairs
    are compared, so the result does not depend on any partition of the data; time grows with n squared (17 s for
    100,000 on one core).
    """
    trusted = np.flatnonzero(entropies >= min_entropy)
    parent = list(range(len(hashes)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = position = parent[parent[position]]
        return position

    rows = max(1, _PAIRS_AT_ONCE // max(1, len(trusted)))
    for start in range(0, len(trusted), rows):
        left, right = trusted[start : start + rows], trusted[start:]
        i, j = np.nonzero(np.bitwise_count(hashes[left, None] ^ hashes[None, right]) <= max_distance)
        i, j = left[i], right[j]
        i, j = i[i < j], j[i < j]
        for part in range(0, len(i), _CONFIRMED_AT_ONCE):
            one, other = i[part : part + _CONFIRMED_AT_ONCE], j[part : part + _CONFIRMED_AT_ONCE]
            worst = np.abs(thumbnails[one].astype(np.int16) - thumbnails[other]).max(axis=1, initial=0)
            for pair in np.flatnonzero(worst <= max_difference):
                low, high = sorted((root(int(one[pair])), root(int(other[pair]))))
                parent[high] = low
    return [root(position) for position in range(len(parent))]
