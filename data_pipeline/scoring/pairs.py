"""Near pairs among many pictures: which are candidates, and how much the two of a pair differ. Pure array functions.

Candidates come from two hashes that fail in different places: the perceptual hash (at most `MAX_DISTANCE` of its 64
bits differ) and the gradient hash (at most `MAX_GRADIENT`). All of them are found, and each once, without comparing
everything with everything: hashes are cut into bands, and by the pigeonhole principle two hashes within 8 bits agree in
one of 3 bands up to 2 bits, two within 4 bits agree in one of 5 bands exactly. `keys` names for every hash those
under which it is filed (of the perceptual bands also those with one bit flipped, so that two that differ by two bits
meet), `candidates` compares what lies under the same key. Any partition of the keys gives the same pairs.

A thumbnail confirms. Compared as it is, or after the gain and offset that fit best (of brightness or contrast, with
clipping at white), the cells of one picture lie above and below those of the other. A watermark or caption that is laid
over a picture, like plain brightening, moves cells one way; another word on the same poster moves some up and others
down. So `differences` is the worst cell of the weaker direction, or an eighth of that of the stronger one, or a quarter
of the worst difference in colour, whichever is greatest: another colour is another picture.

Measured by `tests/benchmarks/near_duplicates.py` on 279 pictures of at least 3 bits of entropy (Debian's
mate-backgrounds, photographs of scikit-image, stamps of tuxpaint) with the default thresholds. Found are all copies in
JPEG at quality 30, 99.6 % of half size, 96.1 and 99.6 % of brightness x 1.3 and x 0.7, and of white watermarks 99.6 %
across the middle at 40 % opacity, all in a corner at 70 %, all tiled ones at 30 %; but only 31 % under an opaque label,
and 9 % with a word added. Taken for each other are none of 558 pairs of posters whose words differ in letters of a
sixth of the width, 1.1 % with letters of a twelfth, and of 38,781 pairs of pictures as they came one of the same art in
two hues, beside four that are copies. One digit on a page of small text changes no cell by more than compression does:
no thumbnail can decide there, so pictures of little entropy (flat drawings, slides, text pages) are never called near,
only equal.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8, UInt64

from data_pipeline.filters.duplicates import COLOUR_SIDE, SIDE, THUMBNAIL

MAX_DISTANCE, MAX_GRADIENT = 8, 4  # bits of the two hashes
MAX_DIFFERENCE = 16.0  # of `differences`
ONE_WAY, COLOUR = 8.0, 4.0  # what is tolerated of a change in one direction, and of colour, for one grey level

# What is filed under a key: `picture` is the caller's number, `kind` tells image-text pairs (0) and edits apart.
MEMBER = np.dtype(
    [("key", np.uint64), ("kind", np.uint64), ("phash", np.uint64), ("dhash", np.uint64), ("picture", np.int64)]
)
PAIR = np.dtype([("left", np.int64), ("right", np.int64), ("distance", np.uint8), ("gradient", np.uint8)])
NEAR = np.dtype([*PAIR.descr, ("difference", np.float32)])
# All that is known of a picture; `pixels` are 64 bits of the hash of its pixels.
PICTURE = np.dtype(
    [("phash", np.uint64), ("dhash", np.uint64), ("pixels", np.uint64), ("thumbnail", np.uint8, THUMBNAIL)]
)

_CELLS = SIDE**2
_FLATTEST = 64.0  # variance below which a picture gives no gain to fit
_DARK, _BRIGHT = 8, 247  # cells that are not clipped
_FILED_AT_ONCE, _COMPARED_AT_ONCE = 1 << 17, 1 << 11  # bound the memory of the steps


@dataclass(frozen=True)
class Band:
    """Bits `shift` to `shift + width` of a hash; `flips`: also filed under the keys with one bit flipped."""

    hash: str
    shift: int
    width: int
    flips: bool

    def of(self, hashes: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        return (hashes >> np.uint64(self.shift)) & np.uint64((1 << self.width) - 1)


BANDS = (
    *(Band("phash", shift, width, True) for shift, width in ((0, 22), (22, 21), (43, 21))),
    *(Band("dhash", shift, width, False) for shift, width in ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))),
)


def keys(band: Band, phash: UInt64[np.ndarray, " n"], dhash: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, "n keys"]:
    """The keys under which pictures are filed in a band: one, or `1 + band.width` for every picture."""
    flips = [0, *(1 << bit for bit in range(band.width))] if band.flips else [0]
    return band.of(phash if band.hash == "phash" else dhash)[:, None] ^ np.array(flips, np.uint64)


def partition(
    keys: UInt64[np.ndarray, "n keys"], kind: UInt64[np.ndarray, " n"], parts: int
) -> Int64[np.ndarray, "n keys"]:
    """Which of `parts` each key belongs to: the same for the same key and kind, and evenly spread."""
    mixed = (keys ^ kind[:, None]) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)


def candidates(band: Band, filed: Shaped[np.ndarray, " m"]) -> Iterator[Shaped[np.ndarray, " p"]]:
    """Compares all members that share key and kind; order of the members does not matter.

    Time grows with the squared number of members of a key.

    Yields:
      Arrays of PAIR, left < right. Over all bands and partitions every pair of pictures of the same kind within
      MAX_DISTANCE or MAX_GRADIENT comes exactly once.
    """
    together = filed["key"] ^ filed["kind"]
    order = np.argsort(together)
    filed, together = filed[order], together[order]
    new = np.ones(len(filed) + 1, bool)
    new[1:-1] = together[1:] != together[:-1]
    starts = np.flatnonzero(new)
    ends = np.repeat(starts[1:], np.diff(starts))
    active, step = np.arange(len(filed)), 0
    while True:  # compares every member with the one `step` further on under the same key
        step += 1
        active = active[active + step < ends[active]]
        if not len(active):
            return
        for part in range(0, len(active), _FILED_AT_ONCE):
            at = active[part : part + _FILED_AT_ONCE]
            yield _compare(band, filed[at], filed[at + step])


def _compare(band: Band, left: Shaped[np.ndarray, " m"], right: Shaped[np.ndarray, " m"]) -> Shaped[np.ndarray, " p"]:
    distance = np.bitwise_count(left["phash"] ^ right["phash"])
    gradient = np.bitwise_count(left["dhash"] ^ right["dhash"])
    near = distance <= MAX_DISTANCE if band.hash == "phash" else (gradient <= MAX_GRADIENT) & (distance > MAX_DISTANCE)
    near &= left["kind"] == right["kind"]
    left, right, distance, gradient = left[near], right[near], distance[near], gradient[near]
    one, other = left[band.hash], right[band.hash]
    first = np.ones(len(left), bool)
    for earlier in BANDS[: BANDS.index(band)]:  # where they met before, they were counted
        if earlier.hash == band.hash:
            first &= np.bitwise_count(earlier.of(one) ^ earlier.of(other)) > 2 * earlier.flips
    one, other = band.of(one), band.of(other)
    differing = one ^ other
    lowest = differing & (~differing + np.uint64(1))
    two = np.bitwise_count(differing) == 2  # they meet under two keys, or under many if they are equal: one counts
    first &= left["key"] == np.where(two, np.minimum(one ^ lowest, other ^ lowest), np.minimum(one, other))
    pairs = np.empty(int(first.sum()), PAIR)
    one, other = left["picture"][first], right["picture"][first]
    pairs["left"], pairs["right"] = np.minimum(one, other), np.maximum(one, other)
    pairs["distance"], pairs["gradient"] = distance[first], gradient[first]
    return pairs


def near(
    pairs: Shaped[np.ndarray, " p"], one: Shaped[np.ndarray, "p k"], other: Shaped[np.ndarray, "p k"]
) -> Shaped[np.ndarray, " q"]:
    """Confirms candidates by all of their pictures.

    Of edits every picture must be near to the one in its place. If some are equal and others are not, the two were made
    to differ, as the noisy and the blurred source of one clean picture: they are not near.

    Args:
      pairs: PAIR, of the first pictures.
      one, other: PICTURE, the k pictures of both sides.

    Returns:
      NEAR, those within MAX_DISTANCE or MAX_GRADIENT and within MAX_DIFFERENCE, each number that of the worst picture.
    """
    equal = one["pixels"] == other["pixels"]
    kept = equal.all(1) | ~equal.any(1)
    found = np.empty(len(pairs), NEAR)
    found["left"], found["right"] = pairs["left"], pairs["right"]
    for name, column in (("distance", "phash"), ("gradient", "dhash")):
        found[name] = np.bitwise_count(one[column] ^ other[column]).max(1)
    kept &= (found["distance"] <= MAX_DISTANCE) | (found["gradient"] <= MAX_GRADIENT)
    found, one, other = found[kept], one[kept], other[kept]
    flat = (pictures["thumbnail"].reshape(-1, THUMBNAIL) for pictures in (one, other))
    found["difference"] = differences(*flat).reshape(one.shape).max(1, initial=0)
    return found[found["difference"] <= MAX_DIFFERENCE]


def differences(one: UInt8[np.ndarray, "n t"], other: UInt8[np.ndarray, "n t"]) -> Float[np.ndarray, " n"]:
    """How much the pictures of each pair differ, from their thumbnails (`filters.duplicates.thumbnail`).

    Returns:
      Grey levels of 255 in steps of 0.01, float32, as described above; the same for (one, other) and (other, one).
    """
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        found[part] = _differences(one[part].astype(np.int64), other[part].astype(np.int64))
    return found


def _differences(one: Int64[np.ndarray, "n t"], other: Int64[np.ndarray, "n t"]) -> Float[np.ndarray, " n"]:
    (x, x_colour), (y, y_colour) = ((cells[:, :_CELLS], cells[:, _CELLS:] - 128) for cells in (one, other))
    assert x_colour.shape[1] == 2 * COLOUR_SIDE**2
    best = _worst((y - x).astype(np.float64), (y_colour - x_colour).astype(np.float64))
    for a, a_colour, b, b_colour in ((x, x_colour, y, y_colour), (y, y_colour, x, x_colour)):
        gain, offset = _fit(a, b)
        fitted = np.clip(gain * a + offset, 0, 255)
        best = np.minimum(best, _worst(b - fitted, b_colour - gain * a_colour))
    return np.round(best, 2)


def _worst(residual: Float[np.ndarray, "n c"], colour: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    up, down = np.maximum(residual.max(1), 0), np.maximum(-residual.min(1), 0)
    both_ways = np.maximum(np.minimum(up, down), np.maximum(up, down) / ONE_WAY)
    return np.maximum(both_ways, np.abs(colour).max(1) / COLOUR)


def _fit(a: Int64[np.ndarray, "n c"], b: Int64[np.ndarray, "n c"]) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset [n, 1] of b over a by least squares over cells that neither picture clips; 1, 0 where flat."""
    ok = (np.minimum(a, b) > _DARK) & (np.maximum(a, b) < _BRIGHT)
    count = np.maximum(ok.sum(1), 1)
    sum_a, sum_b = (a * ok).sum(1), (b * ok).sum(1)  # integers: the same in every order
    spread = count * (a * a * ok).sum(1) - sum_a**2
    common = count * (a * b * ok).sum(1) - sum_a * sum_b
    flat = spread < _FLATTEST * count**2
    gain = np.where(flat, 1.0, np.clip(common / np.maximum(spread, 1), 0.5, 2.0))
    offset = np.where(flat, 0.0, (sum_b - gain * sum_a) / count)
    return gain[:, None], offset[:, None]
