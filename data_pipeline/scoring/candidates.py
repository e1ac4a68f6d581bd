"""Proposes pairs of images worth comparing, by locality-sensitive hashing. Pure array functions.

Either of two hashes proposes a pair, because they fail on different images: the perceptual hash (at most `MAX_DISTANCE`
of 64 bits differ) and the gradient hash (at most `MAX_GRADIENT`). Hashes are cut into bands, and the value of each band
is a key under which the image is indexed. By the pigeonhole principle, two hashes within 8 bits agree in one of 3 bands
up to 2 bits, and two within 4 bits agree in one of 5 bands exactly. In the bands of the perceptual hash, images are
therefore also indexed under every key with one bit flipped, so that two bands that differ in two bits share a key. The
hashes of windows (`windows`) propose crops. They are indexed without flips, and share a key with a whole image whose
band differs in at most one bit.

The number of pairs grows linearly with the number of images, even if all of them look alike, such as the frames of a
film. Under each key, an image is compared with the next `Band.neighbours` images in the order of their hashes. It
proposes at most the `MAX_LINKS` nearest of them and the next one, which joins a crowd into one group without listing
all its pairs. Any partition of the keys proposes the same pairs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt64

from data_pipeline.scoring.windows import WINDOWS

MAX_DISTANCE, MAX_GRADIENT = 8, 4  # bits
MAX_LINKS = 5

# An entry under a key. `image` is the caller's number of the image. `kind` is 0 for image-text pairs and a hash of the
# instructions for edits. `phash` is the hash of the whole image or, if `window` is set, of a window.
ENTRY = np.dtype(
    [
        ("key", np.uint64),
        ("kind", np.uint64),
        ("phash", np.uint64),
        ("dhash", np.uint64),
        ("image", np.int64),
        ("window", bool),
    ]
)
PAIR = np.dtype([("left", np.int64), ("right", np.int64)])

_NO_PAIR = np.uint8(255)  # distance of entries that propose no pair
_WINDOW_PENALTY = 128  # added to distances from windows, so that pairs of whole images come first
_COMPARED_CHUNK = 1 << 17  # bounds the memory


@dataclass(frozen=True)
class Band:
    """Bits `shift` to `shift + width` of a hash.

    With `flips`, images are also indexed under keys with one bit flipped, and their windows without flips. The narrower
    the band, the more images share a key, and the more `neighbours` are compared.
    """

    hash: str
    shift: int
    width: int
    flips: bool
    neighbours: int

    @property
    def keys(self) -> int:
        """Number of keys under which an image and its windows are indexed."""
        return 1 + self.flips * (self.width + len(WINDOWS))

    def key_of(self, hashes: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
        return (hashes >> np.uint64(self.shift)) & np.uint64((1 << self.width) - 1)


BANDS = (
    *(Band("phash", shift, width, True, 128) for shift, width in ((0, 22), (22, 21), (43, 21))),
    *(Band("dhash", shift, width, False, 1024) for shift, width in ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))),
)


def make_entries(
    band: Band,
    image: Int64[np.ndarray, " n"],
    kind: UInt64[np.ndarray, " n"],
    phash: UInt64[np.ndarray, " n"],
    dhash: UInt64[np.ndarray, " n"],
    windows: UInt64[np.ndarray, "n w"],
) -> Shaped[np.ndarray, " m"]:
    """Entries of images under all of their keys in a band, `band.keys` per image."""
    hashes = phash if band.hash == "phash" else dhash
    flips = np.array([0, *(1 << bit for bit in range(band.width))] if band.flips else [0], np.uint64)
    whole = np.empty((len(image), len(flips)), ENTRY)
    whole["key"] = band.key_of(hashes)[:, None] ^ flips
    whole["phash"], whole["window"] = phash[:, None], False
    part = np.empty((len(image), len(WINDOWS) if band.flips else 0), ENTRY)
    if band.flips:
        part["key"], part["phash"], part["window"] = band.key_of(windows), windows, True
    entries = np.concatenate([whole, part], axis=1)
    for name, column in (("image", image), ("kind", kind), ("dhash", dhash)):
        entries[name] = column[:, None]
    return entries.reshape(-1)


def partition(entries: Shaped[np.ndarray, " m"], parts: int) -> Int64[np.ndarray, " m"]:
    """The partition of each entry: evenly spread, and equal for entries with the same key and kind."""
    mixed = (entries["key"] ^ entries["kind"]) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)


def candidates(band: Band, entries: Shaped[np.ndarray, " m"]) -> Shaped[np.ndarray, " p"]:
    """Pairs of images that a band proposes.

    Args:
      band: band of the keys.
      entries: all ENTRYs of some keys, in the order of their images.

    Returns:
      Distinct PAIRs, left < right, sorted. Over all bands and partitions these are all pairs of the same kind within
      MAX_DISTANCE or MAX_GRADIENT, as long as a key has at most `band.neighbours` entries, and an image has at most
      MAX_LINKS such pairs under a key.
    """
    entries, ends = _in_buckets(entries)
    links = np.full((len(entries), MAX_LINKS), -1, np.int64)
    apart = np.full((len(entries), MAX_LINKS), _NO_PAIR, np.uint8)
    following = np.full(len(entries), -1, np.int64)
    active = np.arange(len(entries))
    for step in range(1, band.neighbours + 1):
        active = active[active + step < ends[active]]
        if not len(active):
            break
        for start in range(0, len(active), _COMPARED_CHUNK):
            at = active[start : start + _COMPARED_CHUNK]
            distances = _distances(band, entries[at], entries[at + step])
            at, distances = at[distances < _NO_PAIR], distances[distances < _NO_PAIR]
            following[at] = np.where(following[at] < 0, at + step, following[at])
            _insert(links, apart, at, at + step, distances)
    pairs = [np.empty(0, PAIR)]
    for column in (following, *links.T):
        at = np.flatnonzero(column >= 0)
        pairs.append(_pairs(entries["image"][at], entries["image"][column[at]]))
    return unique_pairs(np.concatenate(pairs))


def unique_pairs(pairs: Shaped[np.ndarray, " p"]) -> Shaped[np.ndarray, " q"]:
    """Removes repeated pairs and sorts the rest."""
    assert pairs["right"].max(initial=0) < 1 << 32
    words = np.unique((pairs["left"].astype(np.uint64) << np.uint64(32)) | pairs["right"].astype(np.uint64))
    return _pairs((words >> np.uint64(32)).astype(np.int64), (words & np.uint64(0xFFFFFFFF)).astype(np.int64))


def _in_buckets(entries: Shaped[np.ndarray, " m"]) -> tuple[Shaped[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Entries that share their key and kind with another one, bucket by bucket, and the end of each one's bucket."""
    together = entries["key"] ^ entries["kind"]
    _, bucket, counts = np.unique(together, return_inverse=True, return_counts=True)
    shared = counts[bucket] > 1
    entries, bucket = entries[shared], bucket[shared]
    order = np.lexsort((entries["phash"], bucket))  # stable: equal hashes stay in the order of their images
    counts = counts[counts > 1]
    return entries[order], np.repeat(np.cumsum(counts), counts)


def _distances(band: Band, left: Shaped[np.ndarray, " m"], right: Shaped[np.ndarray, " m"]) -> UInt8[np.ndarray, " m"]:
    """The distance between the entries of each pair; `_NO_PAIR` if they propose no pair."""
    distance = np.bitwise_count(left["phash"] ^ right["phash"])
    gradient = np.bitwise_count(left["dhash"] ^ right["dhash"])
    windows = left["window"].astype(np.uint8) + right["window"]
    near = distance <= MAX_DISTANCE if band.hash == "phash" else gradient <= MAX_GRADIENT
    near &= (left["kind"] == right["kind"]) & (left["image"] != right["image"]) & (windows < 2)
    apart = np.where(windows, distance + _WINDOW_PENALTY, distance + gradient)
    return np.where(near, apart, _NO_PAIR).astype(np.uint8)


def _insert(
    links: Int64[np.ndarray, "b k"],
    apart: UInt8[np.ndarray, "b k"],
    at: Int64[np.ndarray, " m"],
    to: Int64[np.ndarray, " m"],
    distances: UInt8[np.ndarray, " m"],
) -> None:
    """Inserts `to` into the links of `at`, which are sorted by distance."""
    for slot in range(MAX_LINKS):
        closer = distances < apart[at, slot]
        here = at[closer]
        links[here, slot], to[closer] = to[closer], links[here, slot]
        apart[here, slot], distances[closer] = distances[closer], apart[here, slot]


def _pairs(one: Int64[np.ndarray, " p"], other: Int64[np.ndarray, " p"]) -> Shaped[np.ndarray, " p"]:
    pairs = np.empty(len(one), PAIR)
    pairs["left"], pairs["right"] = np.minimum(one, other), np.maximum(one, other)
    return pairs
