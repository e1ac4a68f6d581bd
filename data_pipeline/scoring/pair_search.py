"""The search for equal and near records of one folder, in worker processes: the second phase of scoring."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Shaped, UInt64
from tqdm import tqdm

from data_pipeline.records.shards import read_manifest
from data_pipeline.scoring.candidates import BANDS, MEMBER, PAIR, candidates, distinct, members, partition
from data_pipeline.scoring.pair_scores import Pairs, are_complete, fingerprints, first_equal, write_pairs
from data_pipeline.scoring.pairs import IMAGE, NEAR, near
from data_pipeline.workers import process_pool

FILED_AT_ONCE = 1 << 20  # entries of a partition; each takes some 150 bytes while it is compared
IN_ONE_PROCESS = 20_000  # contents or pairs for which starting processes takes longer than the work
_BLOCK, _CONFIRMED_AT_ONCE = 1 << 16, 1 << 10
_WORK = ".work-"


@dataclass(frozen=True)
class PairReport:
    """What a search found.

    Attributes:
      records: Number of records.
      contents: Number of different records by their fingerprints, without images of little entropy.
      near: Number of near pairs among these.
    """

    records: int
    contents: int
    near: int

    def to_dict(self) -> dict:
        return {"records": self.records, "contents": self.contents, "near": self.near}


@dataclass(frozen=True)
class Contents:
    """What is compared: the different fingerprints of trusted records.

    Attributes:
      record: Number of the first record with these fingerprints.
      start, images: Position of its first image in `image`, and number of its images.
      kind, phash, dhash, windows: See `pair_scores.Fingerprints`; the hashes of the first image.
      image: IMAGE of all records, in a file.
    """

    record: Int64[np.ndarray, " n"]
    start: Int64[np.ndarray, " n"]
    images: Int64[np.ndarray, " n"]
    kind: UInt64[np.ndarray, " n"]
    phash: UInt64[np.ndarray, " n"]
    dhash: UInt64[np.ndarray, " n"]
    windows: UInt64[np.ndarray, "n w"]
    image: Shaped[np.ndarray, " m"]

    def save(self, folder: Path) -> None:
        for field in fields(self):
            if field.name != "image":
                np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "Contents":
        names = [field.name for field in fields(cls) if field.name != "image"]
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}, image=_images(folder))


def score_pairs(folder: Path | str, *, workers: int = 1, progress: bool = True) -> PairReport | None:
    """Finds equal and near records of a folder whose duplicates and entropy are scored.

    Returns:
      What was found; None if the folder was searched before.

    Raises:
      ValueError: if scores are missing.
      ChildProcessError: if a worker process dies.
    """
    if are_complete(folder):
        return None
    root = Path(folder, "scores", "pairs")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_WORK}*"):  # of a killed run
        shutil.rmtree(leftover, ignore_errors=True)
    with _naming(root), tempfile.TemporaryDirectory(prefix=_WORK, dir=root) as work:
        same, contents = _collect(folder, Path(work))
        found = search(contents, Path(work), workers, progress)
    write_pairs(folder, Pairs(same, found))
    return PairReport(len(same), len(contents.record), len(found))


def search(contents: Contents, work: Path, workers: int = 1, progress: bool = False) -> Shaped[np.ndarray, " p"]:
    """Proposes pairs, partition by partition, and confirms them.

    Args:
      contents: What is compared.
      work: Folder with the file of its images, for worker processes.
      workers: Number of processes; few contents and few pairs are compared in this process alone.
      progress: Whether to show bars.

    Returns:
      NEAR, sorted.
    """
    partitions = [
        (band, part, parts) for band in range(len(BANDS)) for parts in [_parts(band, contents)] for part in range(parts)
    ]
    few = len(contents.record) <= IN_ONE_PROCESS
    proposed, blocks, waiting = np.empty(0, PAIR), [np.empty(0, PAIR)], 0
    found = _run(contents, work, 1 if few else workers, _propose, partitions)
    for pairs in _shown(found, "pairs: propose", len(partitions), progress):
        blocks.append(pairs)
        waiting += len(pairs)
        if waiting > max(_BLOCK, len(proposed)):
            proposed, blocks, waiting = distinct(np.concatenate([proposed, *blocks])), [], 0
    proposed = distinct(np.concatenate([proposed, *blocks]))
    starts = range(0, len(proposed), _CONFIRMED_AT_ONCE)
    tasks = [(proposed[start : start + _CONFIRMED_AT_ONCE],) for start in starts]
    found = _run(contents, work, 1 if len(proposed) <= IN_ONE_PROCESS else workers, _confirm, tasks)
    confirmed = np.concatenate([np.empty(0, NEAR), *_shown(found, "pairs: confirm", len(tasks), progress)])
    return confirmed[np.lexsort((confirmed["right"], confirmed["left"]))]


def _shown(results: Iterable[np.ndarray], title: str, total: int, progress: bool) -> Iterable[np.ndarray]:
    return tqdm(results, desc=title, total=total, disable=not progress or not total, dynamic_ncols=True)


def _run(
    contents: Contents, work: Path, workers: int, function: Callable[..., np.ndarray], tasks: list[tuple]
) -> Iterator[np.ndarray]:
    """Yields `function(contents, *task)` for each task, in worker processes or in this one."""
    if workers <= 1:
        yield from (function(contents, *task) for task in tasks)
        return
    contents.save(work)
    with process_pool(workers, "comparing images") as pool:
        yield from pool.map(partial(_call_saved, work, function), tasks)


def _call_saved(work: Path, function: Callable, task: tuple) -> np.ndarray:
    return function(Contents.load(work), *task)


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
    """Equal records and what is to be compared, of all shards. Images go to a file on the way."""
    columns = []
    with open(work / "image", "wb") as file:
        for shard in read_manifest(folder):
            found = fingerprints(folder, shard)
            file.write(found.image.tobytes())
            columns.append((found.images, found.kind, found.trusted, found.same, *found.hashes()))
    images, kind, trusted, digests, phash, dhash, windows = map(np.concatenate, zip(*columns, strict=True))
    same = np.stack([first_equal(digests[:, column]) for column in range(digests.shape[1])], 1)
    record = np.unique(same[trusted, -1])
    same[images == 0] = -1
    start = np.cumsum(images) - images
    columns_of = {
        "start": start,
        "images": images,
        "kind": kind,
        "phash": phash,
        "dhash": dhash,
        "windows": windows,
    }
    chosen = {name: column[record] for name, column in columns_of.items()}
    return same, Contents(record=record, image=_images(work), **chosen)


def _images(work: Path) -> Shaped[np.ndarray, " m"]:
    path = work / "image"
    return np.memmap(path, IMAGE, "r") if path.stat().st_size else np.empty(0, IMAGE)


def _parts(band: int, contents: Contents) -> int:
    """Number of partitions of a band; the pairs do not depend on it."""
    return max(1, -(-len(contents.record) * BANDS[band].keys // FILED_AT_ONCE))


def _propose(contents: Contents, band: int, part: int, parts: int) -> Shaped[np.ndarray, " p"]:
    """Pairs of positions in `contents` that one partition of a band proposes."""
    filed = [np.empty(0, MEMBER)]
    for start in range(0, len(contents.record), _BLOCK):
        block = slice(start, start + _BLOCK)
        columns = (getattr(contents, name)[block] for name in ("kind", "phash", "dhash", "windows"))
        kind, *hashes = columns
        entries = members(BANDS[band], np.arange(start, start + len(kind)), kind, *hashes)
        filed.append(entries[partition(entries, parts) == part])
    return candidates(BANDS[band], np.concatenate(filed))


def _confirm(contents: Contents, pairs: Shaped[np.ndarray, " p"]) -> Shaped[np.ndarray, " q"]:
    """The pairs of positions that all images confirm, as pairs of records."""
    found = [np.empty(0, NEAR)]
    number, others = contents.images[pairs["left"]], contents.images[pairs["right"]]
    for images in np.unique(number):
        some = pairs[(number == images) & (others == images)]
        places = np.arange(images)
        sides = (contents.image[contents.start[some[side]][:, None] + places] for side in ("left", "right"))
        found.append(near(some, *sides))
    confirmed = np.concatenate(found)
    for side in ("left", "right"):
        confirmed[side] = contents.record[confirmed[side]]
    return confirmed
