"""How much the two images of a pair differ, and which pairs are near duplicates. Pure array functions.

`candidates` proposes pairs by their hashes, and thumbnails confirm them. Thumbnails are compared cell by cell, as they
are or after the best gain and offset (a change of brightness or contrast, with clipping at white). A watermark or
caption laid over an image, like plain brightening, moves cells in one direction; another word on the same poster moves
some up and others down. The difference is therefore the largest of three values: the worst cell in the weaker
direction, an eighth of the worst cell in the stronger one, and a quarter of the worst difference in colour.

A pair that differs more than `MAX_UNREGISTERED` is registered (`registration`) and compared again where both overlap.
This finds crops and frames of a burst. Smooth images, such as skies, have equal gradients and can be registered with
each other, so a pair is only registered if the perceptual hash, of whole images or of a window, proposed it.
Registration can also hide a part of a real difference, so the remaining difference is multiplied by
`REGISTRATION_FACTOR`.

One digit on a page of small text changes no cell by more than compression does, so thumbnails cannot tell such pages
apart. Images of little entropy (flat drawings, slides, text pages) are therefore never near, only equal.

`tests/benchmarks/near_duplicates.py` measures the recall for each kind of copy, and false positives.
"""

import numpy as np
from jaxtyping import Bool, Float, Int32, Num, Shaped, UInt8

from data_pipeline.filters.duplicates import COLOUR_SIDE, FINE_SIDE, SIDE, THUMBNAIL, coarse
from data_pipeline.scoring.candidates import MAX_DISTANCE, MAX_GRADIENT, PAIR
from data_pipeline.scoring.registration import MIN_OVERLAP, SMOOTHINGS, aligned, as_magnified, register, smooth
from data_pipeline.scoring.windows import WINDOWS, window_hashes

MAX_DIFFERENCE = 16.0  # grey levels of 255
MAX_UNREGISTERED = 4.0  # pairs below this difference are not registered
REGISTRATION_FACTOR = 1.25
ONE_WAY_DIVISOR, COLOUR_DIVISOR = 8.0, 4.0  # changes in one direction, and in colour, are divided by these

# A near pair. `overlap` is the share of each image that the other shows; it is 1 unless the two were registered.
NEAR = np.dtype(
    [*PAIR.descr, ("distance", np.uint8), ("gradient", np.uint8), ("difference", np.float32), ("overlap", np.float32)]
)
# The fingerprint of one image; `pixels` is 64 bits of the hash of its pixels.
FINGERPRINT = np.dtype(
    [("phash", np.uint64), ("dhash", np.uint64), ("pixels", np.uint64), ("thumbnail", np.uint8, THUMBNAIL)]
)

NEUTRAL = np.float32(128)  # level of Cb and Cr without colour
_MIN_VARIANCE = 64.0  # variance below which no gain can be fitted
_DARK, _BRIGHT = 8, 247  # grey levels of cells that are not clipped
_COMPARED_CHUNK, _REGISTERED_CHUNK = 1 << 11, 1 << 7  # bound the memory


def confirm_near(
    pairs: Shaped[np.ndarray, " p"], one: Shaped[np.ndarray, "p k"], other: Shaped[np.ndarray, "p k"]
) -> Shaped[np.ndarray, " q"]:
    """Confirms candidates by all of their images.

    Every image of an edit must be near to the image in the same position of the other. If some images are equal and
    others are not, the edits differ on purpose, such as a noisy and a blurred source of one clean image; they are not
    near.

    Args:
      pairs: PAIRs to confirm.
      one, other: FINGERPRINTs of the k images of both sides.

    Returns:
      NEARs within MAX_DISTANCE or MAX_GRADIENT and within MAX_DIFFERENCE. Each figure is that of the worst image.
    """
    equal = one["pixels"] == other["pixels"]
    kept = equal.all(1) | ~equal.any(1)
    pairs, one, other = pairs[kept], one[kept], other[kept]
    distance = np.bitwise_count(one["phash"] ^ other["phash"])
    gradient = np.bitwise_count(one["dhash"] ^ other["dhash"])
    far = distance.max(1) > MAX_DISTANCE
    distance[far] = np.minimum(distance[far], _window_distance(one[far], other[far]))
    rows = np.empty(len(pairs), NEAR)
    rows["left"], rows["right"] = pairs["left"], pairs["right"]
    rows["distance"], rows["gradient"] = distance.max(1), gradient.max(1)
    kept = (rows["distance"] <= MAX_DISTANCE) | (rows["gradient"] <= MAX_GRADIENT)
    rows, one, other = rows[kept], one[kept], other[kept]
    left, right = (images["thumbnail"].reshape(-1, THUMBNAIL) for images in (one, other))
    difference, overlap = compare_thumbnails(left, right, np.repeat(rows["distance"] <= MAX_DISTANCE, one.shape[1]))
    rows["difference"] = difference.reshape(one.shape).max(1, initial=0)
    rows["overlap"] = overlap.reshape(one.shape).min(1, initial=1)
    return rows[rows["difference"] <= MAX_DIFFERENCE]


def _window_distance(one: Shaped[np.ndarray, "p k"], other: Shaped[np.ndarray, "p k"]) -> UInt8[np.ndarray, "p k"]:
    """The smallest distance between the hash of one image and that of a window of the other."""
    best = np.full(one.shape, 64, np.uint8)
    for whole, part in ((one, other), (other, one)):
        cells = coarse(_luma(part["thumbnail"].reshape(-1, THUMBNAIL)))
        hashes = window_hashes(cells).reshape(*part.shape, len(WINDOWS))
        best = np.minimum(best, np.bitwise_count(whole["phash"][..., None] ^ hashes).min(-1))
    return best


def compare_thumbnails(
    one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"], movable: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The difference and the overlap of the images of each pair.

    Args:
      one, other: thumbnails (`filters.duplicates.thumbnail`).
      movable: whether each pair may be registered.

    Returns:
      Differences in grey levels of 255, in steps of 0.01, and overlaps as shares; float32. The overlap is 1 for pairs
      that were not registered.
    """
    difference = differences(one, other)
    overlap = np.ones(len(one), np.float32)
    apart = np.flatnonzero((difference > MAX_UNREGISTERED) & movable)
    for start in range(0, len(apart), _REGISTERED_CHUNK):
        at = apart[start : start + _REGISTERED_CHUNK]
        registered, shared = _registered_differences(one[at], other[at])
        better = (registered < difference[at]) & (shared >= MIN_OVERLAP)
        difference[at[better]], overlap[at[better]] = registered[better], shared[better]
    return difference, overlap


def differences(one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"]) -> Float[np.ndarray, " n"]:
    """The difference of the images of each pair, cell by cell, without registration.

    Args:
      one, other: thumbnails.

    Returns:
      Grey levels of 255 in steps of 0.01, float32; symmetric in `one` and `other`.
    """
    result = np.empty(len(one), np.float32)
    for start in range(0, len(one), _COMPARED_CHUNK):
        part = slice(start, start + _COMPARED_CHUNK)
        cells = (coarse(_luma(side[part])).reshape(-1, SIDE**2).astype(np.int32) for side in (one, other))
        colours = (coarse(_colour(side[part])).reshape(len(one[part]), -1) - NEUTRAL for side in (one, other))
        result[part] = _differences(*cells, *colours)
    return result


def _luma(thumbnails: UInt8[np.ndarray, "n t"]) -> UInt8[np.ndarray, "n f f"]:
    return thumbnails[:, : FINE_SIDE**2].reshape(-1, FINE_SIDE, FINE_SIDE)


def _colour(thumbnails: UInt8[np.ndarray, "n t"]) -> UInt8[np.ndarray, "n 2 c c"]:
    """Cb and Cr; 128 is grey."""
    return thumbnails[:, FINE_SIDE**2 :].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE)


def _differences(
    x: Int32[np.ndarray, "n c"],
    y: Int32[np.ndarray, "n c"],
    x_colour: Float[np.ndarray, "n d"],
    y_colour: Float[np.ndarray, "n d"],
) -> Float[np.ndarray, " n"]:
    best = _worst(y - x, y_colour - x_colour)
    everywhere = np.ones((1, 1), bool)
    for a, a_colour, b, b_colour in ((x, x_colour, y, y_colour), (y, y_colour, x, x_colour)):
        gain, offset = _fit(a, b, everywhere)
        fitted = np.clip(gain * a + offset, 0, 255)
        best = np.minimum(best, _worst(b - fitted, b_colour - gain * a_colour))
    return np.round(best, 2)


def _registered_differences(
    one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The difference inside the overlap, and the overlap."""
    fine = [smooth(_luma(side).astype(np.float32), SMOOTHINGS) for side in (one, other)]
    colour = [_smooth_colour(side) for side in (one, other)]
    mapping = register(*fine)
    swap = mapping.scale.prod(1) > 1  # the wider view is resampled
    mapping = mapping.inverse().where(swap, mapping)
    fine, colour = (
        [np.where(_broadcast(swap, a), b, a), np.where(_broadcast(swap, a), a, b)] for a, b in (fine, colour)
    )
    fine[1] = as_magnified(fine[1], mapping)
    resampled, seen = aligned(fine[0], fine[1], mapping)
    seen = seen.reshape(len(one), -1)
    a, b = (np.round(cells).reshape(len(one), -1).astype(np.int32) for cells in (resampled, fine[1]))
    shown = [aligned(colour[0][:, channel], colour[1][:, channel], mapping) for channel in (0, 1)]
    a_colour = np.stack([cells for cells, _ in shown], 1).reshape(len(one), -1)
    b_colour, seen_colour = colour[1].reshape(len(one), -1), np.tile(shown[0][1].reshape(len(one), -1), (1, 2))
    gain, offset = _fit(a, b, seen)
    fitted = np.clip(gain * a + offset, 0, 255)
    best = _worst((b - a) * seen, (b_colour - a_colour) * seen_colour)
    best = np.minimum(best, _worst((b - fitted) * seen, (b_colour - gain * a_colour) * seen_colour))
    return np.round(REGISTRATION_FACTOR * best, 2).astype(np.float32), mapping.overlap.astype(np.float32)


def _smooth_colour(thumbnails: UInt8[np.ndarray, "n t"]) -> Float[np.ndarray, "n 2 c c"]:
    colour = _colour(thumbnails) - NEUTRAL
    return smooth(colour.reshape(-1, COLOUR_SIDE, COLOUR_SIDE), 1).reshape(colour.shape)


def _broadcast(choose: Bool[np.ndarray, " n"], like: np.ndarray) -> Bool[np.ndarray, "n ..."]:
    return choose.reshape(-1, *[1] * (like.ndim - 1))


def _worst(residual: Num[np.ndarray, "n c"], colour: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    up, down = np.maximum(residual.max(1), 0), np.maximum(-residual.min(1), 0)
    both_ways = np.maximum(np.minimum(up, down), np.maximum(up, down) / ONE_WAY_DIVISOR)
    return np.maximum(both_ways, np.abs(colour).max(1) / COLOUR_DIVISOR)


def _fit(
    a: Int32[np.ndarray, "n c"], b: Int32[np.ndarray, "n c"], seen: Bool[np.ndarray, "#n #c"]
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares gain and offset [n, 1] from a to b over cells that neither image clips; 1 and 0 where flat."""
    ok = seen & (np.minimum(a, b) > _DARK) & (np.maximum(a, b) < _BRIGHT)
    count = np.maximum(ok.sum(1), 1)
    a, b = a * ok, b * ok
    sums = (cells.sum(1, dtype=np.int64) for cells in (a, b, a * a, a * b))  # integer sums do not depend on the order
    sum_a, sum_b, sum_aa, sum_ab = sums
    spread = count * sum_aa - sum_a**2
    common = count * sum_ab - sum_a * sum_b
    flat = spread < _MIN_VARIANCE * count**2
    gain = np.where(flat, 1.0, np.clip(common / np.maximum(spread, 1), 0.5, 2.0))
    offset = np.where(flat, 0.0, (sum_b - gain * sum_a) / count)
    return gain[:, None].astype(np.float32), offset[:, None].astype(np.float32)
