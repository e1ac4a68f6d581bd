"""The search for pairs in one folder, in worker processes: the second phase of scoring."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped, UInt64
from tqdm import tqdm

from data_pipeline.records.shards import read_manifest
from data_pipeline.scoring.pair_scores import Pairs, are_complete, fingerprints, first_equal, write_pairs
from data_pipeline.scoring.pairs import BANDS, MEMBER, NEAR, PICTURE, candidates, keys, near, partition
from data_pipeline.workers import process_pool

FILED_AT_ONCE = 1 << 21  # members of a partition, 40 bytes each
IN_ONE_PROCESS = 50_000  # contents that are not worth starting processes for
_BLOCK, _CONFIRMED_AT_ONCE = 1 << 16, 1 << 13
_WORK = ".work-"


@dataclass(frozen=True)
class PairReport:
    """How many records there are, how many different ones by their fingerprints, and how many near pairs of these."""

    records: int
    contents: int
    near: int

    def to_dict(self) -> dict:
        return {"records": self.records, "contents": self.contents, "near": self.near}


@dataclass(frozen=True)
class Contents:
    """What is compared: the different fingerprints among records that are trusted.

    Attributes:
      record: number of the first record with these.
      start, pictures: where its pictures stand in `picture`, and how many.
      kind, phash, dhash: `pair_scores.Fingerprints`, the hashes of the first picture.
      picture: PICTURE of all records, in a file.
    """

    record: Int64[np.ndarray, " n"]
    start: Int64[np.ndarray, " n"]
    pictures: Int64[np.ndarray, " n"]
    kind: UInt64[np.ndarray, " n"]
    phash: UInt64[np.ndarray, " n"]
    dhash: UInt64[np.ndarray, " n"]
    picture: Shaped[np.ndarray, " m"]

    def save(self, folder: Path) -> None:
        for field in fields(self):
            if field.name != "picture":
                np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "Contents":
        names = [field.name for field in fields(cls) if field.name != "picture"]
        return cls(
            **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}, picture=_pictures(folder)
        )


def score_pairs(folder: Path | str, *, workers: int = 1, progress: bool = True) -> PairReport | None:
    """Finds equal and near records of a folder whose duplicates and entropy are scored; None: it was done before.

    Raises:
      ValueError: when scores are missing.
      ChildProcessError: when a worker process dies.
    """
    if are_complete(folder):
        return None
    root = Path(folder, "scores", "pairs")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_WORK}*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    with _naming(root), tempfile.TemporaryDirectory(prefix=_WORK, dir=root) as work:
        same, contents = _collect(folder, Path(work))
        tasks = [
            (band, part, parts)
            for band in range(len(BANDS))
            for parts in [_parts(band, contents)]
            for part in range(parts)
        ]
        found = [np.empty(0, NEAR)]
        with tqdm(total=len(tasks), desc="pairs", disable=not progress, dynamic_ncols=True) as bar:
            for pairs in _run(Path(work), contents, tasks, workers):
                found.append(pairs)
                bar.update()
    everything = np.concatenate(found)
    everything = everything[np.lexsort((everything["right"], everything["left"]))]
    write_pairs(folder, Pairs(same, everything))
    return PairReport(len(same), len(contents.record), len(everything))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Lets the error of a failed write, as on a full disk, name the folder if it names no file."""
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from None


def _collect(folder: Path | str, work: Path) -> tuple[Int64[np.ndarray, "n 3"], Contents]:
    """What is the same, and what is to be compared, of all shards; pictures go to a file on the way."""
    columns = []
    with open(work / "picture", "wb") as file:
        for shard in read_manifest(folder):
            found = fingerprints(folder, shard)
            file.write(found.picture.tobytes())
            hashes = np.zeros((2, len(found.pictures)), np.uint64)
            whole = found.pictures > 0
            for row, name in zip(hashes, ("phash", "dhash"), strict=True):
                row[whole] = found.picture[name][found.first_picture[whole]]
            columns.append((found.pictures, found.kind, found.trusted, found.same, *hashes))
    pictures, kind, trusted, digests, phash, dhash = map(np.concatenate, zip(*columns, strict=True))
    same = np.stack([first_equal(digests[:, column]) for column in range(digests.shape[1])], 1)
    record = np.unique(same[trusted, -1])
    same[pictures == 0] = -1
    start = np.cumsum(pictures) - pictures
    start, pictures, kind, phash, dhash = (column[record] for column in (start, pictures, kind, phash, dhash))
    return same, Contents(record, start, pictures, kind, phash, dhash, _pictures(work))


def _pictures(work: Path) -> Shaped[np.ndarray, " m"]:
    path = work / "picture"
    return np.memmap(path, PICTURE, "r") if path.stat().st_size else np.empty(0, PICTURE)


def _parts(band: int, contents: Contents) -> int:
    """Into how many partitions a band is cut; pairs do not depend on it."""
    filed = len(contents.record) * (1 + BANDS[band].width * BANDS[band].flips)
    return max(1, -(-filed // FILED_AT_ONCE))


def _run(
    work: Path, contents: Contents, tasks: list[tuple[int, int, int]], workers: int
) -> Iterator[Shaped[np.ndarray, " p"]]:
    if workers <= 1 or len(contents.record) <= IN_ONE_PROCESS:
        for task in tasks:
            yield _search(contents, *task)
        return
    contents.save(work)
    with process_pool(workers, "comparing pictures") as pool:
        yield from pool.map(_search_saved, [work] * len(tasks), *zip(*tasks, strict=True))


def _search_saved(work: Path, band: int, part: int, parts: int) -> Shaped[np.ndarray, " p"]:
    return _search(Contents.load(work), band, part, parts)


def _search(contents: Contents, band: int, part: int, parts: int) -> Shaped[np.ndarray, " p"]:
    """Near pairs among the keys of one partition of a band."""
    filed = []
    for start in range(0, len(contents.record), _BLOCK):
        block = slice(start, start + _BLOCK)
        filed_under = keys(BANDS[band], contents.phash[block], contents.dhash[block])
        rows, columns = np.nonzero(partition(filed_under, contents.kind[block], parts) == part)
        chosen = np.empty(len(rows), MEMBER)
        chosen["key"], chosen["picture"] = filed_under[rows, columns], rows + start
        for name in ("kind", "phash", "dhash"):
            chosen[name] = getattr(contents, name)[block][rows]
        filed.append(chosen)
    found, waiting, count = [np.empty(0, NEAR)], [], 0
    for pairs in candidates(BANDS[band], np.concatenate([np.empty(0, MEMBER), *filed])):
        waiting.append(pairs)
        count += len(pairs)
        if count >= _CONFIRMED_AT_ONCE:
            found.append(_confirm(contents, np.concatenate(waiting)))
            waiting, count = [], 0
    if count:
        found.append(_confirm(contents, np.concatenate(waiting)))
    return np.concatenate(found)


def _confirm(contents: Contents, pairs: Shaped[np.ndarray, " p"]) -> Shaped[np.ndarray, " q"]:
    """Candidates, by their positions, that all pictures confirm, by their records."""
    found = [np.empty(0, NEAR)]
    number, others = contents.pictures[pairs["left"]], contents.pictures[pairs["right"]]
    for pictures in np.unique(number):
        some = pairs[(number == pictures) & (others == pictures)]
        for start in range(0, len(some), _CONFIRMED_AT_ONCE):
            part = some[start : start + _CONFIRMED_AT_ONCE]
            places = np.arange(pictures)
            sides = (contents.picture[contents.start[part[side]][:, None] + places] for side in ("left", "right"))
            found.append(near(part, *sides))
    confirmed = np.concatenate(found)
    for side in ("left", "right"):
        confirmed[side] = contents.record[confirmed[side]]
    return confirmed
