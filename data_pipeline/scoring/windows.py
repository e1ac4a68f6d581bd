"""Hashes of parts of an image, which match cropped copies.

A perceptual hash changes by few bits when 2% of an image is cut off, but by many at 10%. Every image is therefore
indexed under the hash of the whole and under those of `WINDOWS`: parts with 95% or 90% of its width and height. The
hash of a crop is within a few bits of that of the nearest window.
"""

import numpy as np
from jaxtyping import UInt8, UInt64

from data_pipeline.filters.duplicates import SIDE

# Top, left and side of each window, as shares of the image's height and width.
WINDOWS = tuple(
    (top, left, share)
    for share, places in ((0.95, (0.0, 0.05)), (0.9, (0.0, 0.05, 0.1)))
    for top in places
    for left in places
)
_FREQUENCIES = 8  # DCT frequencies per axis in a hash


def _cosines(start: float, share: float) -> np.ndarray:
    """DCT [_FREQUENCIES, SIDE] of a part of an axis, which is first resampled to SIDE cells."""
    edges = np.linspace(start, start + share, SIDE + 1) * SIDE
    cells = np.arange(SIDE)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    resample = np.maximum(overlap, 0) / share
    angles = np.pi * np.arange(_FREQUENCIES)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
    return 2 * np.cos(angles) @ resample


_PARTS = sorted({(start, share) for top, left, share in WINDOWS for start in (top, left)})
_TRANSFORM = np.concatenate([_cosines(*part) for part in _PARTS])
_CHUNK = 1 << 10  # images per batch; bounds the memory


def window_hashes(luma: UInt8[np.ndarray, "n s s"]) -> UInt64[np.ndarray, "n w"]:
    """Perceptual hashes (`duplicates.perceptual_hash`) of every window, for images of SIDE x SIDE cells."""
    hashes = np.empty((len(luma), len(WINDOWS)), np.uint64)
    for start in range(0, len(luma), _CHUNK):
        coefficients = _TRANSFORM @ luma[start : start + _CHUNK].astype(np.float64) @ _TRANSFORM.T
        for number, (top, left, share) in enumerate(WINDOWS):
            rows, columns = (_FREQUENCIES * _PARTS.index((place, share)) for place in (top, left))
            low = coefficients[:, rows : rows + _FREQUENCIES, columns : columns + _FREQUENCIES]
            hashes[start : start + _CHUNK, number] = _signs(low.reshape(len(low), -1))
    return hashes


def _signs(low: np.ndarray) -> UInt64[np.ndarray, " n"]:
    low = np.round(low, 6)  # removes rounding errors around 0
    median = np.sort(low, axis=1)[:, 31:33].mean(1, keepdims=True)
    return np.packbits(low > median, axis=1).view(">u8").astype(np.uint64)[:, 0]
