"""Equal and near records of a folder, on disk. The search runs once per folder.

    DIR/scores/pairs/same.parquet   a row per record: the first record with the same bytes, pixels, fingerprints
    DIR/scores/pairs/near.parquet   a row per near pair of different fingerprints, each as its first record
    DIR/scores/pairs/done.json      versions, bounds and digests of all shards for which both tables are valid

Records are numbered as in `RecordFolder`; -1 means a broken record. The bounds of nearness are wide (`candidates`,
`pairs`), and selection applies its thresholds to the pairs within them. A new record in the folder makes both tables
stale, since it may be near to any other.

Of a crowd of records that are all near to each other, the table lists some pairs per record and not all pairs
(`candidates`). Memory is about 230 bytes per record and 30 per near pair. Thumbnails are kept in a temporary file next
to the result, which takes 4.6 kB per record.
"""

import base64
import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, Shaped, UInt64

from data_pipeline.filters.duplicates import DUPLICATES, FINE_SIDE, HASH, coarse
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.shards import Shard, read_manifest
from data_pipeline.scoring.candidates import MAX_DISTANCE, MAX_GRADIENT
from data_pipeline.scoring.pairs import FINGERPRINT, MAX_DIFFERENCE, NEAR
from data_pipeline.scoring.score_tables import TABLE, from_parquet, naming_damage, read_shard_scores, to_parquet
from data_pipeline.scoring.windows import WINDOWS, window_hashes
from qi2_jax.runtime.atomic import write_atomic, write_json_atomic

VERSION = 2
MIN_ENTROPY = 2.0  # bits; flatter images look alike without being copies
SAME = ("bytes", "pixels", "fingerprints")


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of consecutive records.

    Attributes:
      num_images: number of images per record; 0 for a broken one.
      kind: 0 for image-text pairs; for edits, a hash of their instructions.
      trusted: whether the image has enough entropy to be near to another.
      same: 128 bits for each of `SAME`.
      prints: FINGERPRINTs of the images of all records, one after the other.
    """

    num_images: Int64[np.ndarray, " n"]
    kind: UInt64[np.ndarray, " n"]
    trusted: Bool[np.ndarray, " n"]
    same: UInt64[np.ndarray, "n 3 2"]
    prints: Shaped[np.ndarray, " m"]

    def hashes(self) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"], UInt64[np.ndarray, "n w"]]:
        """Perceptual and gradient hash of each record's first image, and hashes of its windows; 0 if broken."""
        whole = self.num_images > 0
        first = self.prints[(np.cumsum(self.num_images) - self.num_images)[whole]]
        phash, dhash = np.zeros((2, len(whole)), np.uint64)
        windows = np.zeros((len(whole), len(WINDOWS)), np.uint64)
        phash[whole], dhash[whole] = first["phash"], first["dhash"]
        fine = first["thumbnail"][:, : FINE_SIDE**2].reshape(-1, FINE_SIDE, FINE_SIDE)
        windows[whole] = window_hashes(coarse(fine))
        return phash, dhash, windows


@dataclass(frozen=True)
class Pairs:
    """Equal and near records.

    Attributes:
      same: for every record and each of `SAME`, the first record with the same digest; -1 for broken records.
      near: sorted NEARs between the first records of different fingerprints.
    """

    same: Int64[np.ndarray, "n 3"]
    near: Shaped[np.ndarray, " p"]


def fingerprints(folder: Path | str, shard: Shard) -> Fingerprints:
    """The fingerprints of a shard's records, from its scores.

    Raises:
      ValueError: if the scores are missing.
    """
    bits = read_shard_scores(folder, ENTROPY, shard).column("entropy.bits").to_pylist()
    table = read_shard_scores(folder, DUPLICATES, shard)
    column = {name: table.column(f"duplicates.{name}").to_pylist() for name in DUPLICATES.columns}
    seen = list(zip(*(column[name] for name in ("phash", "dhash", "edit_pixels", "thumbnail", "edit")), strict=True))
    whole = [row for row in seen if row[0] is not None]
    phash, dhash = (_words(row[place] for row in whole) for place in (0, 1))
    prints = np.empty(len(phash), FINGERPRINT)
    prints["phash"], prints["dhash"] = phash, dhash
    prints["pixels"] = _words(row[2] or "0" * HASH for row in whole)
    prints["thumbnail"] = np.frombuffer(b"".join(base64.b64decode(row[3]) for row in whole), np.uint8).reshape(
        prints["thumbnail"].shape
    )
    everything = (hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in seen)
    digests = zip(column["bytes_sha256"], column["pixels_sha256"], everything, strict=True)
    return Fingerprints(
        np.array([len(row[0] or "") // HASH for row in seen], np.int64),
        _words((row[4] or "0" * HASH)[:HASH] for row in seen),
        np.array([found is not None and found >= MIN_ENTROPY for found in bits], bool),
        _words((digest or "0" * 32)[:32] for digest in itertools.chain.from_iterable(digests)).reshape(-1, 3, 2),
        prints,
    )


def _words(texts: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    return np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)


def first_equal(digests: UInt64[np.ndarray, "n 2"]) -> Int64[np.ndarray, " n"]:
    """For each position, the first position with the same digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: each run begins with its first position
    new = np.ones(len(order), bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    first = np.empty(len(order), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def are_complete(folder: Path | str) -> bool:
    """Whether the tables exist and are valid for the current records and versions."""
    same, near, marker = paths(folder)
    try:
        if not (same.is_file() and near.is_file()):
            return False
        content = json.loads(marker.read_bytes())
        return {key: value for key, value in content.items() if key != TABLE} == validity(folder)
    except (OSError, ValueError, AttributeError):
        return False


def write_pairs(folder: Path | str, pairs: Pairs) -> None:
    """Writes the two tables and then the marker."""
    same, near, marker = paths(folder)
    same.parent.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)  # otherwise it would be valid after the first of two writes
    tables = (
        to_parquet(pa.table({name: pairs.same[:, column] for column, name in enumerate(SAME)})),
        to_parquet(pa.table({name: pairs.near[name] for name in NEAR.names or ()})),
    )
    for path, data in zip((same, near), tables, strict=True):
        write_atomic(path, data)
    write_json_atomic(marker, validity(folder) | {TABLE: [hashlib.sha256(data).hexdigest() for data in tables]})


def read_pairs(folder: Path | str) -> Pairs:
    """The equal and near records of a folder.

    Raises:
      ValueError: if the tables are missing, stale or damaged.
    """
    if not are_complete(folder):
        raise ValueError(
            f"{folder}: duplicates have not been compared since its records or filters changed; run "
            f"`qi2 data score {folder}`"
        )
    same, near, marker = paths(folder)
    with naming_damage(same.parent, folder):
        digests = json.loads(marker.read_bytes()).get(TABLE, (None, None))  # None for tables of earlier versions
        tables = [from_parquet(path.read_bytes(), digest) for path, digest in zip((same, near), digests, strict=True)]
        columns = [{name: table.column(name).to_numpy() for name in table.column_names} for table in tables]
        rows = np.empty(tables[1].num_rows, NEAR)
        for name in NEAR.names or ():
            rows[name] = columns[1][name]
        pairs = Pairs(np.stack([columns[0][name] for name in SAME], 1), rows)
        if len(pairs.same) != sum(shard.records for shard in read_manifest(folder)):
            raise ValueError(f"{len(pairs.same)} rows")
    return pairs


def paths(folder: Path | str) -> tuple[Path, Path, Path]:
    """The two tables and the marker."""
    root = Path(folder, "scores", "pairs")
    return root / "same.parquet", root / "near.parquet", root / "done.json"


def validity(folder: Path | str) -> dict:
    """Versions, bounds and digests of shards for which the tables are valid."""
    return {
        "version": VERSION,
        "filters": {filter.name: filter.version for filter in (DUPLICATES, ENTROPY)},
        "bounds": [MAX_DISTANCE, MAX_GRADIENT, MAX_DIFFERENCE, MIN_ENTROPY],
        "shards": {shard.file: shard.digest for shard in read_manifest(folder)},
    }
