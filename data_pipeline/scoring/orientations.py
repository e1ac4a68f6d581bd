"""Copies that only the hold-out table recognises: mirrored, turned by quarter turns, and without colour.

The search for duplicates compares images as they are. To find copies in any of the eight orientations with a second
search of the same kind, every image is first brought to a canonical orientation: brighter to the right than to the
left, brighter below than above, and by more from left to right than from top to bottom. If such a difference is small,
the image is entered in all orientations that come into question, so that compression or a crop does not separate
copies.

A copy without colour is compared by brightness alone. Two coloured images are still compared by their colours.

In canonical orientation, more images resemble each other by chance: all skies have the same gradients. The gradient
hash therefore proposes and confirms nothing here, and thumbnails must agree better.
"""

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped, UInt8

from data_pipeline.filters.duplicates import COLOUR_SIDE, FINE_SIDE, THUMBNAIL, coarse, gradient_hash, perceptual_hash
from data_pipeline.scoring.candidates import BANDS, MAX_DISTANCE
from data_pipeline.scoring.pairs import NEAR, NEUTRAL, confirm_near

MARGIN = 0.05  # difference between halves, in standard deviations of brightness, that is too small to decide
GREY = 4  # levels by which the colour of an image without colour differs from neutral, after compression
MAX_DIFFERENCE = 9.0  # grey levels of 255; `pairs.MAX_DIFFERENCE` is wider
PROPOSED_BY = tuple(number for number, band in enumerate(BANDS) if band.hash == "phash")

# Whether rows and columns are exchanged, and then whether each axis is reversed.
ORIENTATIONS = tuple((turn, down, across) for turn in (False, True) for down in (1, -1) for across in (1, -1))


def canonical(
    prints: Shaped[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, " m"], Shaped[np.ndarray, " m"]]:
    """Brings images to their canonical orientations.

    Args:
      prints: FINGERPRINTs of images.

    Returns:
      The position in `prints` of each entry, in order, and its FINGERPRINT. An image has one entry or several.
    """
    down, across = _differences_of_halves(_luma(prints["thumbnail"]))
    decided = [
        (sign_down * first >= -MARGIN) & (sign_across * second >= -MARGIN) & (np.abs(second) - np.abs(first) >= -MARGIN)
        for turn, sign_down, sign_across in ORIENTATIONS
        for first, second in [(across, down) if turn else (down, across)]
    ]
    image, orientation = np.nonzero(np.stack(decided, 1))
    entries = prints[image].copy()
    for number, how in enumerate(ORIENTATIONS):
        at = orientation == number
        entries["thumbnail"][at] = oriented(entries["thumbnail"][at], *how)
    for entry, luma in zip(entries, coarse(_luma(entries["thumbnail"])), strict=True):
        entry["phash"], entry["dhash"] = int(perceptual_hash(luma), 16), int(gradient_hash(luma), 16)
    return image, entries


def oriented(thumbnails: UInt8[np.ndarray, "n t"], turn: bool, down: int, across: int) -> UInt8[np.ndarray, "n t"]:
    """Thumbnails of images in one of the `ORIENTATIONS`."""
    parts = []
    for channels, side in ((thumbnails[:, : FINE_SIDE**2], FINE_SIDE), (thumbnails[:, FINE_SIDE**2 :], COLOUR_SIDE)):
        cells = channels.reshape(len(thumbnails), channels.shape[1] // side**2, side, side)
        cells = (cells.swapaxes(2, 3) if turn else cells)[:, :, ::down, ::across]
        parts.append(cells.reshape(channels.shape))
    return np.concatenate(parts, 1)


def confirm_copies(
    pairs: Shaped[np.ndarray, " p"], one: Shaped[np.ndarray, "p 1"], other: Shaped[np.ndarray, "p 1"]
) -> Shaped[np.ndarray, " q"]:
    """Confirms candidates as `pairs.confirm_near` does, more strictly, and by brightness alone if one has no colour.

    Args:
      pairs: PAIRs to confirm.
      one, other: FINGERPRINTs of both sides, in canonical orientations.

    Returns:
      NEARs.
    """
    grey = (_is_grey(one["thumbnail"][:, 0]) | _is_grey(other["thumbnail"][:, 0]))[:, None, None]
    near = [np.empty(0, NEAR)]
    if len(pairs):
        sides = []
        for side in (one, other):
            side = side.copy()
            colour = side["thumbnail"][..., FINE_SIDE**2 :]
            side["thumbnail"][..., FINE_SIDE**2 :] = np.where(grey, np.uint8(NEUTRAL), colour)
            sides.append(side)
        near.append(confirm_near(pairs, *sides))
    found = np.concatenate(near)
    return found[(found["difference"] <= MAX_DIFFERENCE) & (found["distance"] <= MAX_DISTANCE)]


def _is_grey(thumbnails: UInt8[np.ndarray, "n t"]) -> Bool[np.ndarray, " n"]:
    return np.abs(thumbnails[:, FINE_SIDE**2 :] - NEUTRAL).max(1, initial=0) <= GREY


def _luma(thumbnails: UInt8[np.ndarray, "n t"]) -> UInt8[np.ndarray, "n f f"]:
    assert thumbnails.shape[1] == THUMBNAIL
    return thumbnails[:, : FINE_SIDE**2].reshape(-1, FINE_SIDE, FINE_SIDE)


def _differences_of_halves(
    luma: UInt8[np.ndarray, "n f f"],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """How much brighter the lower half is than the upper one, and the right half than the left one.

    Both are in standard deviations of brightness. Cells count more the further they are from the middle line.
    """
    cells = coarse(luma).astype(np.float64)
    place = np.linspace(-1, 1, cells.shape[1])
    spread = np.maximum(cells.std((1, 2)), 1)
    return (cells.mean(2) @ place) / len(place) / spread, (cells.mean(1) @ place) / len(place) / spread
