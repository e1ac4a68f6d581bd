"""Which images are worth comparing: those whose hashes meet under a common key. Pure array functions.

Two hashes propose a pair, and they fail in different places: the perceptual hash (at most `MAX_DISTANCE` of 64 bits
differ) and the gradient hash (at most `MAX_GRADIENT`). Hashes are cut into bands, and images are filed under the
value of each band. By the pigeonhole principle two hashes within 8 bits agree in one of 3 bands up to 2 bits, and two
within 4 bits agree in one of 5 bands exactly. In the bands of the perceptual hash, images are therefore also filed
under every key with one bit flipped, so that two that differ in two bits meet. Crops are proposed by the hashes of
windows (`windows`), which are filed as they are: they meet a whole image whose band differs in at most one bit.

The number of pairs grows linearly with the number of images, even if all of them look alike, as the frames of a film
do. Under each key an image is compared with the next `Band.neighbours` in the order of their hashes. It proposes at
most the `LINKS` nearest of them and the next one. That joins a crowd into one group without listing all its pairs.
Any partition of the keys proposes the same pairs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped, UInt8, UInt64

from data_pipeline.scoring.windows import WINDOWS

MAX_DISTANCE, MAX_GRADIENT = 8, 4  # bits
LINKS = 5

# An entry under a key. `image` is the caller's number of the image; `kind` separates image-text pairs (0) and edits
# by their instructions; `phash` is the hash of the whole image or, if `window` is set, of a window.
MEMBER = np.dtype(
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

_NEVER = np.uint8(255)  # "these two propose no pair"
_OF_WINDOW = 128  # added to the distance from a window: pairs of whole images come first
_COMPARED_AT_ONCE = 1 << 17  # bounds the memory


@dataclass(frozen=True)
class Band:
    """Bits `shift` to `shift + width` of a hash.

    With `flips`, images are also filed under keys with one bit flipped, and their windows as they are. A key holds
    many images if the band is narrow, so these are compared with more `neighbours`.
    """

    hash: str
    shift: int
    width: int
    flips: bool
    neighbours: int

    @property
    def keys(self) -> int:
        """Number of keys under which an image and its windows are filed."""
        return 1 + self.flips * (self.width + len(WINDOWS))

    def of(self, hashes: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
        return (hashes >> np.uint64(self.shift)) & np.uint64((1 << self.width) - 1)


BANDS = (
    *(Band("phash", shift, width, True, 128) for shift, width in ((0, 22), (22, 21), (43, 21))),
    *(Band("dhash", shift, width, False, 1024) for shift, width in ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))),
)


def members(
    band: Band,
    image: Int64[np.ndarray, " n"],
    kind: UInt64[np.ndarray, " n"],
    phash: UInt64[np.ndarray, " n"],
    dhash: UInt64[np.ndarray, " n"],
    windows: UInt64[np.ndarray, "n w"],
) -> Shaped[np.ndarray, " m"]:
    """Entries of images under all of their keys in a band: `band.keys` for each image."""
    hashes = phash if band.hash == "phash" else dhash
    flips = np.array([0, *(1 << bit for bit in range(band.width))] if band.flips else [0], np.uint64)
    whole = np.empty((len(image), len(flips)), MEMBER)
    whole["key"] = band.of(hashes)[:, None] ^ flips
    whole["phash"], whole["window"] = phash[:, None], False
    part = np.empty((len(image), len(WINDOWS) if band.flips else 0), MEMBER)
    if band.flips:
        part["key"], part["phash"], part["window"] = band.of(windows), windows, True
    entries = np.concatenate([whole, part], axis=1)
    for name, column in (("image", image), ("kind", kind), ("dhash", dhash)):
        entries[name] = column[:, None]
    return entries.reshape(-1)


def partition(entries: Shaped[np.ndarray, " m"], parts: int) -> Int64[np.ndarray, " m"]:
    """The partition of each entry: evenly spread, and the same for entries with the same key and kind."""
    mixed = (entries["key"] ^ entries["kind"]) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)


def candidates(band: Band, entries: Shaped[np.ndarray, " m"]) -> Shaped[np.ndarray, " p"]:
    """Pairs of images that a band proposes.

    Args:
      band: The band.
      entries: MEMBER, those of whole keys, in the order of their images.

    Returns:
      Different PAIRs, left < right, sorted. Over all bands and partitions these are all pairs of the same kind within
      MAX_DISTANCE or MAX_GRADIENT, as long as a key holds at most `band.neighbours` entries, and an image has at most
      LINKS of such pairs under it.
    """
    entries, ends = _in_buckets(entries)
    links = np.full((len(entries), LINKS), -1, np.int64)
    apart = np.full((len(entries), LINKS), _NEVER, np.uint8)
    following = np.full(len(entries), -1, np.int64)
    active = np.arange(len(entries))
    for step in range(1, band.neighbours + 1):
        active = active[active + step < ends[active]]
        if not len(active):
            break
        for start in range(0, len(active), _COMPARED_AT_ONCE):
            at = active[start : start + _COMPARED_AT_ONCE]
            found = _apart(band, entries[at], entries[at + step])
            at, found = at[found < _NEVER], found[found < _NEVER]
            following[at] = np.where(following[at] < 0, at + step, following[at])
            _insert(links, apart, at, at + step, found)
    pairs = [np.empty(0, PAIR)]
    for column in (following, *links.T):
        at = np.flatnonzero(column >= 0)
        pairs.append(_pairs(entries["image"][at], entries["image"][column[at]]))
    return distinct(np.concatenate(pairs))


def distinct(pairs: Shaped[np.ndarray, " p"]) -> Shaped[np.ndarray, " q"]:
    """Every pair once, sorted."""
    assert pairs["right"].max(initial=0) < 1 << 32
    words = np.unique((pairs["left"].astype(np.uint64) << np.uint64(32)) | pairs["right"].astype(np.uint64))
    return _pairs((words >> np.uint64(32)).astype(np.int64), (words & np.uint64(0xFFFFFFFF)).astype(np.int64))


def _in_buckets(entries: Shaped[np.ndarray, " m"]) -> tuple[Shaped[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Entries that share their key and kind with another one, bucket by bucket, and where the bucket of each ends."""
    together = entries["key"] ^ entries["kind"]
    _, bucket, counts = np.unique(together, return_inverse=True, return_counts=True)
    shared = counts[bucket] > 1
    entries, bucket = entries[shared], bucket[shared]
    order = np.lexsort((entries["phash"], bucket))  # stable: equal hashes stay in the order of their images
    counts = counts[counts > 1]
    return entries[order], np.repeat(np.cumsum(counts), counts)


def _apart(band: Band, left: Shaped[np.ndarray, " m"], right: Shaped[np.ndarray, " m"]) -> UInt8[np.ndarray, " m"]:
    """How far the entries of each pair are from each other; `_NEVER` if they propose nothing."""
    distance = np.bitwise_count(left["phash"] ^ right["phash"])
    gradient = np.bitwise_count(left["dhash"] ^ right["dhash"])
    windows = left["window"].astype(np.uint8) + right["window"]
    near = distance <= MAX_DISTANCE if band.hash == "phash" else gradient <= MAX_GRADIENT
    near &= (left["kind"] == right["kind"]) & (left["image"] != right["image"]) & (windows < 2)
    apart = np.where(windows, distance + _OF_WINDOW, distance + gradient)
    return np.where(near, apart, _NEVER).astype(np.uint8)


def _insert(
    links: Int64[np.ndarray, "b k"],
    apart: UInt8[np.ndarray, "b k"],
    at: Int64[np.ndarray, " m"],
    to: Int64[np.ndarray, " m"],
    found: UInt8[np.ndarray, " m"],
) -> None:
    """Enters `to` among the links of `at`, which are kept in the order of their distance."""
    for slot in range(LINKS):
        closer = found < apart[at, slot]
        here = at[closer]
        links[here, slot], to[closer] = to[closer], links[here, slot]
        apart[here, slot], found[closer] = found[closer], apart[here, slot]


def _pairs(one: Int64[np.ndarray, " p"], other: Int64[np.ndarray, " p"]) -> Shaped[np.ndarray, " p"]:
    pairs = np.empty(len(one), PAIR)
    pairs["left"], pairs["right"] = np.minimum(one, other), np.maximum(one, other)
    return pairs
