"""How much the two images of a pair differ, and which pairs are near duplicates. Pure array functions.

`candidates` proposes pairs by their hashes; a thumbnail confirms them. Compared as it is, or after the gain and offset
that fit best (of brightness or contrast, with clipping at white), the cells of one image lie above and below those of
the other. A watermark or caption that is laid over an image, like plain brightening, moves cells one way; another word
on the same poster moves some up and others down. So the difference is the worst cell of the weaker direction, an eighth
of the worst of the stronger one, or a quarter of the worst difference in colour, whichever is greatest: another colour
is another image.

A pair that differs more than `SAME_PLACE` is registered (`registration`) and compared again where both show the same.
This finds crops and frames of a burst. Smooth images, such as skies, have equal gradients and can be registered with
each other, so the perceptual hash must have proposed the pair, by the whole images or by a window. A registration can
also hide some of a real difference, which is why the difference that remains counts `REGISTERED` times.

One digit on a page of small text changes no cell by more than compression does. No thumbnail can decide there, so
images of little entropy (flat drawings, slides, text pages) are never near, only equal.

`tests/benchmarks/near_duplicates.py` measures recall for each kind of copy, and how many other images are taken for
copies.
"""

import numpy as np
from jaxtyping import Bool, Float, Int32, Num, Shaped, UInt8

from data_pipeline.filters.duplicates import COLOUR_SIDE, FINE_SIDE, SIDE, THUMBNAIL, coarse
from data_pipeline.scoring.candidates import MAX_DISTANCE, MAX_GRADIENT, PAIR
from data_pipeline.scoring.registration import MIN_OVERLAP, SMOOTHINGS, aligned, as_magnified, register, smooth
from data_pipeline.scoring.windows import WINDOWS, window_hashes

MAX_DIFFERENCE = 16.0  # grey levels of 255
SAME_PLACE = 4.0  # pairs below this difference are not registered
REGISTERED = 1.25
ONE_WAY, COLOUR = 8.0, 4.0  # changes in one direction, and of colour, count this fraction

# A near pair. `overlap` is the share of each image that the other shows: 1 unless the two had to be registered.
NEAR = np.dtype(
    [*PAIR.descr, ("distance", np.uint8), ("gradient", np.uint8), ("difference", np.float32), ("overlap", np.float32)]
)
# What is known of one image; `pixels` are 64 bits of the hash of its pixels.
IMAGE = np.dtype(
    [("phash", np.uint64), ("dhash", np.uint64), ("pixels", np.uint64), ("thumbnail", np.uint8, THUMBNAIL)]
)

GREY = np.float32(128)  # level of Cb and Cr without colour
_FLATTEST = 64.0  # variance below which an image gives no gain to fit
_DARK, _BRIGHT = 8, 247  # grey levels of cells that are not clipped
_COMPARED_AT_ONCE, _REGISTERED_AT_ONCE = 1 << 11, 1 << 7  # bound the memory


def near(
    pairs: Shaped[np.ndarray, " p"], one: Shaped[np.ndarray, "p k"], other: Shaped[np.ndarray, "p k"]
) -> Shaped[np.ndarray, " q"]:
    """Confirms candidates by all of their images.

    Every image of an edit must be near to the one in its place. If some are equal and others are not, the two edits
    were made to differ, as the noisy and the blurred source of one clean image: they are not near.

    Args:
      pairs: PAIR.
      one, other: IMAGE, the k images of both sides.

    Returns:
      NEAR, the pairs within MAX_DISTANCE or MAX_GRADIENT and within MAX_DIFFERENCE. Each number is that of the worst
      image.
    """
    equal = one["pixels"] == other["pixels"]
    kept = equal.all(1) | ~equal.any(1)
    pairs, one, other = pairs[kept], one[kept], other[kept]
    distance = np.bitwise_count(one["phash"] ^ other["phash"])
    gradient = np.bitwise_count(one["dhash"] ^ other["dhash"])
    far = distance.max(1) > MAX_DISTANCE
    distance[far] = np.minimum(distance[far], _window_distance(one[far], other[far]))
    found = np.empty(len(pairs), NEAR)
    found["left"], found["right"] = pairs["left"], pairs["right"]
    found["distance"], found["gradient"] = distance.max(1), gradient.max(1)
    kept = (found["distance"] <= MAX_DISTANCE) | (found["gradient"] <= MAX_GRADIENT)
    found, one, other = found[kept], one[kept], other[kept]
    left, right = (images["thumbnail"].reshape(-1, THUMBNAIL) for images in (one, other))
    difference, overlap = compare(left, right, np.repeat(found["distance"] <= MAX_DISTANCE, one.shape[1]))
    found["difference"] = difference.reshape(one.shape).max(1, initial=0)
    found["overlap"] = overlap.reshape(one.shape).min(1, initial=1)
    return found[found["difference"] <= MAX_DIFFERENCE]


def _window_distance(one: Shaped[np.ndarray, "p k"], other: Shaped[np.ndarray, "p k"]) -> UInt8[np.ndarray, "p k"]:
    """The smallest distance between the hash of one image and that of a window of the other."""
    best = np.full(one.shape, 64, np.uint8)
    for whole, part in ((one, other), (other, one)):
        cells = coarse(_luma(part["thumbnail"].reshape(-1, THUMBNAIL)))
        hashes = window_hashes(cells).reshape(*part.shape, len(WINDOWS))
        best = np.minimum(best, np.bitwise_count(whole["phash"][..., None] ^ hashes).min(-1))
    return best


def compare(
    one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"], movable: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """How much the images of each pair differ, and how much of each the other shows.

    Args:
      one, other: Thumbnails (`filters.duplicates.thumbnail`).
      movable: Pairs that may be registered.

    Returns:
      Grey levels of 255 in steps of 0.01, and shares; float32. An overlap below 1 tells of a registration.
    """
    difference = differences(one, other)
    overlap = np.ones(len(one), np.float32)
    apart = np.flatnonzero((difference > SAME_PLACE) & movable)
    for start in range(0, len(apart), _REGISTERED_AT_ONCE):
        at = apart[start : start + _REGISTERED_AT_ONCE]
        registered, shared = _registered(one[at], other[at])
        better = (registered < difference[at]) & (shared >= MIN_OVERLAP)
        difference[at[better]], overlap[at[better]] = registered[better], shared[better]
    return difference, overlap


def differences(one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"]) -> Float[np.ndarray, " n"]:
    """How much the images of each pair differ, cell by cell, without registration.

    Args:
      one, other: Thumbnails.

    Returns:
      Grey levels of 255 in steps of 0.01, float32; the same for (one, other) and (other, one).
    """
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        cells = (coarse(_luma(side[part])).reshape(-1, SIDE**2).astype(np.int32) for side in (one, other))
        colours = (coarse(_colour(side[part])).reshape(len(one[part]), -1) - GREY for side in (one, other))
        found[part] = _differences(*cells, *colours)
    return found


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


def _registered(
    one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The difference where both show the same, and how much of each the other shows."""
    fine = [smooth(_luma(side).astype(np.float32), SMOOTHINGS) for side in (one, other)]
    colour = [_smooth_colour(side) for side in (one, other)]
    mapping = register(*fine)
    swap = mapping.scale.prod(1) > 1  # the wider view is the one that is resampled
    mapping = mapping.inverse().where(swap, mapping)
    fine, colour = ([np.where(_as(swap, a), b, a), np.where(_as(swap, a), a, b)] for a, b in (fine, colour))
    fine[1] = as_magnified(fine[1], mapping)
    found, seen = aligned(fine[0], fine[1], mapping)
    seen = seen.reshape(len(one), -1)
    a, b = (np.round(cells).reshape(len(one), -1).astype(np.int32) for cells in (found, fine[1]))
    shown = [aligned(colour[0][:, channel], colour[1][:, channel], mapping) for channel in (0, 1)]
    a_colour = np.stack([cells for cells, _ in shown], 1).reshape(len(one), -1)
    b_colour, seen_colour = colour[1].reshape(len(one), -1), np.tile(shown[0][1].reshape(len(one), -1), (1, 2))
    gain, offset = _fit(a, b, seen)
    fitted = np.clip(gain * a + offset, 0, 255)
    best = _worst((b - a) * seen, (b_colour - a_colour) * seen_colour)
    best = np.minimum(best, _worst((b - fitted) * seen, (b_colour - gain * a_colour) * seen_colour))
    return np.round(REGISTERED * best, 2).astype(np.float32), mapping.overlap.astype(np.float32)


def _smooth_colour(thumbnails: UInt8[np.ndarray, "n t"]) -> Float[np.ndarray, "n 2 c c"]:
    colour = _colour(thumbnails) - GREY
    return smooth(colour.reshape(-1, COLOUR_SIDE, COLOUR_SIDE), 1).reshape(colour.shape)


def _as(choose: Bool[np.ndarray, " n"], like: np.ndarray) -> Bool[np.ndarray, "n ..."]:
    return choose.reshape(-1, *[1] * (like.ndim - 1))


def _worst(residual: Num[np.ndarray, "n c"], colour: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    up, down = np.maximum(residual.max(1), 0), np.maximum(-residual.min(1), 0)
    both_ways = np.maximum(np.minimum(up, down), np.maximum(up, down) / ONE_WAY)
    return np.maximum(both_ways, np.abs(colour).max(1) / COLOUR)


def _fit(
    a: Int32[np.ndarray, "n c"], b: Int32[np.ndarray, "n c"], seen: Bool[np.ndarray, "#n #c"]
) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset [n, 1] of b over a by least squares over cells that neither image clips; 1, 0 where flat."""
    ok = seen & (np.minimum(a, b) > _DARK) & (np.maximum(a, b) < _BRIGHT)
    count = np.maximum(ok.sum(1), 1)
    a, b = a * ok, b * ok
    sums = (cells.sum(1, dtype=np.int64) for cells in (a, b, a * a, a * b))  # integers: the same in every order
    sum_a, sum_b, sum_aa, sum_ab = sums
    spread = count * sum_aa - sum_a**2
    common = count * sum_ab - sum_a * sum_b
    flat = spread < _FLATTEST * count**2
    gain = np.where(flat, 1.0, np.clip(common / np.maximum(spread, 1), 0.5, 2.0))
    offset = np.where(flat, 0.0, (sum_b - gain * sum_a) / count)
    return gain[:, None].astype(np.float32), offset[:, None].astype(np.float32)
