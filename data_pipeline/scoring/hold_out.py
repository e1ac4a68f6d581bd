"""Hold-out numbers: each record has a number in [0, 1), and near duplicates share it.

    DIR/scores/hold_out/numbers.parquet   a row per record: its number
    DIR/scores/hold_out/done.json         versions, bounds and digests of all shards for which the table is valid

A record is held out from training if its number is below the fraction `data.held_out` (`samples.held_out`). Images are
compared one by one, so the source of an edit is compared with the images of all pairs and edits. A group contains:

- images with equal pixels, and all near pairs that the pair search confirms;
- copies that are mirrored, turned by quarter turns or without colour, which a second search finds (`orientations`);
- the source and the target of an edit with one source.

The number of a group is the hash of one of its images, its representative. Pairs without copies therefore have the
number that `samples.held_out.image_hash` gives them, and a group of a thousand copies is held out no more often than a
single image. Neither the order of records nor their shards matter.

A composition (an edit with several sources) does not join its sources into one group: a cut-out that is used a thousand
times would join a thousand images, until nearly all records were one group. Instead, the number of a composition's
target is at most those of its sources. A composition of a held-out image is therefore held out, with all copies and
edits of its target. A record has the lowest number of its images.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int64, Shaped, UInt8, UInt64

from data_pipeline.filters.duplicates import COLOUR_SIDE, FINE_SIDE, coarse
from data_pipeline.records.shards import Shard, read_manifest
from data_pipeline.scoring.orientations import PROPOSED_BY, canonical, confirm_copies
from data_pipeline.scoring.pair_scores import SAME, fingerprints, first_equal, read_pairs, validity
from data_pipeline.scoring.pair_search import Contents, read_prints, search, work_folder
from data_pipeline.scoring.score_tables import TABLE, from_parquet, naming_damage, to_parquet
from data_pipeline.scoring.windows import window_hashes
from qi2_jax.runtime.atomic import write_atomic, write_json_atomic

VERSION = 2  # 1: only copies in the same orientation and with their colours
MIN_SOURCE_BITS = 4.0  # entropy of a source's thumbnail; flatter sources, such as sketches, are never near
_MAX_EVEN = 2  # levels between the cells of an even thumbnail, such as that of an empty canvas


@dataclass(frozen=True)
class Images:
    """All images of a folder, in the order of their records.

    Attributes:
      record: number of each image's record.
      first: whether it is the target, which is the only image of a pair.
      pixels: 64 bits of the hash of its pixels.
      digest: 128 bits of which the number is made: hash of the file for pairs, and of the pixels for edits.
      prints: 128 bits of the hash of its fingerprint.
      trusted: whether it has enough entropy to be near to another.
      even: whether it shows nothing, so that equal ones do not belong together.
    """

    record: Int64[np.ndarray, " m"]
    first: Bool[np.ndarray, " m"]
    pixels: UInt64[np.ndarray, " m"]
    digest: UInt64[np.ndarray, "m 2"]
    prints: UInt64[np.ndarray, "m 2"]
    trusted: Bool[np.ndarray, " m"]
    even: Bool[np.ndarray, " m"]


def score_hold_out(folder: Path | str, *, workers: int = 1, progress: bool = True) -> bool:
    """Computes the hold-out numbers of a folder after `pair_search.score_pairs`.

    Returns:
      Whether they were missing.

    Raises:
      ValueError: if scores or pairs are missing.
      ChildProcessError: if a worker process dies.
    """
    if is_complete(folder):
        return False
    table, marker = paths(folder)
    images = _collect(folder)
    with work_folder(table.parent) as work:
        near = _near_images(folder, images, work, workers, progress)
    numbers = hold_out_numbers(images, near, sum(shard.records for shard in read_manifest(folder)))
    data = to_parquet(pa.table({"number": numbers}))
    marker.unlink(missing_ok=True)  # otherwise it would be valid after the first of two writes
    write_atomic(table, data)
    write_json_atomic(marker, _validity(folder) | {TABLE: hashlib.sha256(data).hexdigest()})
    return True


def is_complete(folder: Path | str) -> bool:
    """Whether the numbers exist and are valid for the current records and versions."""
    table, marker = paths(folder)
    try:
        content = json.loads(marker.read_bytes())
        return table.is_file() and {key: value for key, value in content.items() if key != TABLE} == _validity(folder)
    except (OSError, ValueError, AttributeError):
        return False


def read_numbers(folder: Path | str) -> Float[np.ndarray, " n"]:
    """The hold-out number of every record of a folder, whose numbers are complete.

    Raises:
      ValueError: if the table is damaged.
    """
    table, marker = paths(folder)
    with naming_damage(table.parent, folder):
        rows = from_parquet(table.read_bytes(), json.loads(marker.read_bytes())[TABLE])
        numbers = rows.column("number").to_numpy().astype(np.float64)
        if len(numbers) != sum(shard.records for shard in read_manifest(folder)):
            raise ValueError(f"{len(numbers)} rows")
    return numbers


def paths(folder: Path | str) -> tuple[Path, Path]:
    """The table and its marker."""
    root = Path(folder, "scores", "hold_out")
    return root / "numbers.parquet", root / "done.json"


def hold_out_numbers(images: Images, near: Shaped[np.ndarray, " p"], count: int) -> Float[np.ndarray, " n"]:
    """The number of every record.

    Args:
      images: all images.
      near: NEARs between images.
      count: number of records; those without an image, which are broken, have the number 1.
    """
    group, per_record = _groups(images, near), np.bincount(images.record, minlength=count)
    of_edit = per_record[images.record] > 1  # the file of a pair is preferred as representative
    counted = images.first | ~images.even  # a source that shows nothing, such as an empty canvas, has no influence
    order = np.lexsort((images.digest[:, 0], images.digest[:, 1], of_edit, ~counted, group))
    _, representative = np.unique(group[order], return_index=True)
    # Another part of the digest chooses the representative, so that large groups have no lower numbers.
    number = (images.digest[order[representative], 0] >> np.uint64(16)).astype(np.float64) / 2**48
    targets = group[images.first][np.cumsum(per_record > 0)[images.record] - 1]
    sources = counted & ~images.first & (per_record[images.record] > 2)
    while True:  # as often as compositions are the sources of others
        before = number.copy()
        np.minimum.at(number, targets[sources], before[group[sources]])
        if np.array_equal(number, before):
            break
    result = np.ones(count, np.float64)
    np.minimum.at(result, images.record[counted], number[group[counted]])
    return result


def _groups(images: Images, near: Shaped[np.ndarray, " p"]) -> Int64[np.ndarray, " m"]:
    """The group number of every image, from 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(images.record)
    numbers = np.arange(count)
    shown = np.flatnonzero(~images.even)
    same = np.stack([images.pixels[shown], np.zeros(len(shown), np.uint64)], 1)
    trusted, first = _distinct(images)
    target = np.flatnonzero(images.first)
    single = target[np.bincount(images.record)[images.record[target]] == 2]
    edges = (
        (shown, shown[first_equal(same)]),
        (trusted, first),
        (near["left"], near["right"]),
        (single, single + 1),
    )
    rows, columns = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64) if count else numbers


def _distinct(images: Images) -> tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, " t"]]:
    """The trusted images, and for each the first one with the same fingerprint."""
    trusted = np.flatnonzero(images.trusted)
    return trusted, trusted[first_equal(images.prints[trusted])]


def _near_images(
    folder: Path | str, images: Images, work: Path, workers: int, progress: bool
) -> Shaped[np.ndarray, " p"]:
    """NEARs between images: as they are, and in canonical orientations.

    Without edits, those of images as they are come from the pair search, which compares edits as a whole.
    """
    trusted, first = _distinct(images)
    compared = np.unique(first)
    if images.first.all():
        near, content = read_pairs(folder).near.copy(), first_equal(images.prints)
        image = np.arange(len(images.record))
        image[content[trusted]] = first
        for side in ("left", "right"):
            near[side] = image[content[np.searchsorted(images.record, near[side])]]
    else:
        with work_folder(work / "unchanged") as here:
            near = search(_contents(folder, compared, here, turned=False), here, workers, progress)
    with work_folder(work / "turned") as here:
        contents = _contents(folder, compared, here, turned=True)
        copies = search(contents, here, workers, progress, bands=PROPOSED_BY, confirm=confirm_copies)
    return np.concatenate([near, copies[copies["left"] != copies["right"]]])  # without images that are symmetric


def _contents(folder: Path | str, at: Int64[np.ndarray, " n"], work: Path, *, turned: bool) -> Contents:
    """Some images as contents to compare, whose fingerprints are written to a file.

    Args:
      folder: folder of the records.
      at: sorted positions of the images.
      work: folder for the file.
      turned: whether the images are brought to their canonical orientations; some then have several contents.
    """
    columns: list[list[np.ndarray]] = [[], [], [], []]
    start = 0
    with open(work / "prints", "wb") as file:
        for shard in read_manifest(folder):
            prints = fingerprints(folder, shard).prints
            image = at[(start <= at) & (at < start + len(prints))]
            start, chosen = start + len(prints), prints[image - start]
            if turned:
                entry, chosen = canonical(chosen)
                image = image[entry]
            file.write(chosen.tobytes())
            cells = coarse(chosen["thumbnail"][:, : FINE_SIDE**2].reshape(-1, FINE_SIDE, FINE_SIDE))
            parts = (image, chosen["phash"], chosen["dhash"], window_hashes(cells))
            for column, part in zip(columns, parts, strict=True):
                column.append(part)
    image, phash, dhash, windows = map(np.concatenate, columns)
    ones, zeros = np.ones(len(image), np.int64), np.zeros(len(image), np.uint64)
    return Contents(image, np.arange(len(image)), ones, zeros, phash, dhash, windows, read_prints(work))


def _collect(folder: Path | str) -> Images:
    columns: dict[str, list[np.ndarray]] = {}
    start = 0
    for shard in read_manifest(folder):
        for name, column in _columns(folder, shard).items():
            columns.setdefault(name, []).append(column + start if name == "record" else column)
        start += shard.records
    return Images(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _columns(folder: Path | str, shard: Shard) -> dict[str, np.ndarray]:
    """The fields of `Images` for a shard, whose records are counted from 0."""
    found = fingerprints(folder, shard)
    prints, counts = found.prints, found.num_images
    record = np.repeat(np.arange(len(counts)), counts)
    first = np.zeros(len(record), bool)
    first[(np.cumsum(counts) - counts)[counts > 0]] = True
    alone = counts[record] == 1
    luma, colour = np.split(prints["thumbnail"], [FINE_SIDE**2], axis=1)
    colour = colour.reshape(-1, 2, COLOUR_SIDE**2)
    pixels = np.where(alone, found.same[record, SAME.index("pixels"), 0], prints["pixels"])
    files = found.same[record, SAME.index("bytes")]
    trusted = found.trusted[record]
    trusted[~first] &= _bits(luma[~first]) >= MIN_SOURCE_BITS
    return {
        "record": record,
        "first": first,
        "pixels": pixels,
        "digest": np.where(alone[:, None], files, _digests([word.tobytes() for word in pixels])),
        "prints": _digests([row.tobytes() for row in prints["thumbnail"]]),  # the hashes are computed from it
        "trusted": trusted,
        "even": (np.ptp(luma, axis=1) <= _MAX_EVEN) & (np.ptp(colour, axis=2).max(1) <= _MAX_EVEN),
    }


def _digests(data: list[bytes]) -> UInt64[np.ndarray, "m 2"]:
    joined = b"".join(hashlib.sha256(one).digest()[:16] for one in data)
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def _bits(luma: UInt8[np.ndarray, "m c"]) -> Float[np.ndarray, " m"]:
    """Entropy of the grey levels of each thumbnail, in bits."""
    shares = np.stack([np.bincount(row, minlength=256) for row in luma] or [np.zeros(256, np.int64)]) / max(
        1, luma.shape[1]
    )
    return -np.sum(shares * np.log2(np.where(shares > 0, shares, 1)), axis=1)[: len(luma)]


def _validity(folder: Path | str) -> dict:
    return {"version": VERSION, "pairs": validity(folder)}
