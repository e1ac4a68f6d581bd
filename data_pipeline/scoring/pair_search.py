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
from data_pipeline.scoring.candidates import BANDS, ENTRY, PAIR, candidates, make_entries, partition, unique_pairs
from data_pipeline.scoring.pair_scores import Pairs, are_complete, fingerprints, first_equal, write_pairs
from data_pipeline.scoring.pairs import FINGERPRINT, NEAR, confirm_near
from data_pipeline.workers import process_pool

ENTRIES_PER_PARTITION = 1 << 20  # each entry takes some 150 bytes while it is compared
MAX_FOR_ONE_PROCESS = 20_000  # contents or pairs up to which starting processes takes longer than the work
_INDEXED_CHUNK, _CONFIRMED_CHUNK = 1 << 16, 1 << 10
_WORK = ".work-"


@dataclass(frozen=True)
class PairReport:
    """The result of a search.

    Attributes:
      records: number of records.
      contents: number of distinct fingerprints, without images of little entropy.
      near: number of near pairs among these.
    """

    records: int
    contents: int
    near: int

    def to_dict(self) -> dict:
        return {"records": self.records, "contents": self.contents, "near": self.near}


@dataclass(frozen=True)
class Contents:
    """The distinct fingerprints of trusted records, which are compared.

    Attributes:
      record: number of the first record with these fingerprints.
      start, num_images: position of its first image in `prints`, and number of its images.
      kind, phash, dhash, windows: kind and hashes of the first image, see `pair_scores.Fingerprints`.
      prints: FINGERPRINTs of all records, in a file.
    """

    record: Int64[np.ndarray, " n"]
    start: Int64[np.ndarray, " n"]
    num_images: Int64[np.ndarray, " n"]
    kind: UInt64[np.ndarray, " n"]
    phash: UInt64[np.ndarray, " n"]
    dhash: UInt64[np.ndarray, " n"]
    windows: UInt64[np.ndarray, "n w"]
    prints: Shaped[np.ndarray, " m"]

    def save(self, folder: Path) -> None:
        for field in fields(self):
            if field.name != "prints":
                np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> "Contents":
        names = [field.name for field in fields(cls) if field.name != "prints"]
        return cls(
            **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}, prints=read_prints(folder)
        )


def score_pairs(folder: Path | str, *, workers: int = 1, progress: bool = True) -> PairReport | None:
    """Finds equal and near records of a folder in which the filters `duplicates` and `entropy` have scored.

    Returns:
      Counts; None if the folder was searched before.

    Raises:
      ValueError: if scores are missing.
      ChildProcessError: if a worker process dies.
    """
    if are_complete(folder):
        return None
    with work_folder(Path(folder, "scores", "pairs")) as work:
        same, contents = _collect(folder, work)
        near = search(contents, work, workers, progress)
    write_pairs(folder, Pairs(same, near))
    return PairReport(len(same), len(contents.record), len(near))


Confirm = Callable[..., Shaped[np.ndarray, " q"]]  # as `confirm_near`: PAIRs and FINGERPRINTs of both sides to NEARs


def search(
    contents: Contents,
    work: Path,
    workers: int = 1,
    progress: bool = False,
    *,
    bands: Iterable[int] = range(len(BANDS)),
    confirm: Confirm = confirm_near,
) -> Shaped[np.ndarray, " p"]:
    """Proposes pairs, partition by partition, and confirms them.

    Args:
      contents: fingerprints to compare.
      work: folder with the file of the images' fingerprints, for worker processes.
      workers: number of processes; few contents or pairs are compared in this process alone.
      progress: whether to show progress bars.
      bands: numbers of the bands that propose pairs.
      confirm: decides which of the proposed pairs are near.

    Returns:
      Sorted NEARs.
    """
    partitions = [(band, part, parts) for band in bands for parts in [_parts(band, contents)] for part in range(parts)]
    few = len(contents.record) <= MAX_FOR_ONE_PROCESS
    proposed, blocks, waiting = np.empty(0, PAIR), [np.empty(0, PAIR)], 0
    results = _run(contents, work, 1 if few else workers, _propose, partitions)
    for pairs in _with_progress(results, "pairs: propose", len(partitions), progress):
        blocks.append(pairs)
        waiting += len(pairs)
        if waiting > max(_INDEXED_CHUNK, len(proposed)):
            proposed, blocks, waiting = unique_pairs(np.concatenate([proposed, *blocks])), [], 0
    proposed = unique_pairs(np.concatenate([proposed, *blocks]))
    starts = range(0, len(proposed), _CONFIRMED_CHUNK)
    tasks = [(proposed[start : start + _CONFIRMED_CHUNK], confirm) for start in starts]
    results = _run(contents, work, 1 if len(proposed) <= MAX_FOR_ONE_PROCESS else workers, _confirm, tasks)
    confirmed = np.concatenate([np.empty(0, NEAR), *_with_progress(results, "pairs: confirm", len(tasks), progress)])
    return confirmed[np.lexsort((confirmed["right"], confirmed["left"]))]


def _with_progress(results: Iterable[np.ndarray], title: str, total: int, progress: bool) -> Iterable[np.ndarray]:
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
def work_folder(root: Path) -> Iterator[Path]:
    """A temporary folder in `root`, without those that killed runs left there.

    Raises:
      OSError: if the disk is full; the error names `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_WORK}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with _naming_folder(root), tempfile.TemporaryDirectory(prefix=_WORK, dir=root) as work:
        yield Path(work)


@contextlib.contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Adds the folder to the error of a failed write, such as on a full disk, if the error names no file."""
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from None


def _collect(folder: Path | str, work: Path) -> tuple[Int64[np.ndarray, "n 3"], Contents]:
    """The equal records of all shards, and the contents to compare. Fingerprints of images are written to a file."""
    columns = []
    with open(work / "prints", "wb") as file:
        for shard in read_manifest(folder):
            shard_prints = fingerprints(folder, shard)
            file.write(shard_prints.prints.tobytes())
            columns.append(
                (
                    shard_prints.num_images,
                    shard_prints.kind,
                    shard_prints.trusted,
                    shard_prints.same,
                    *shard_prints.hashes(),
                )
            )
    num_images, kind, trusted, digests, phash, dhash, windows = map(np.concatenate, zip(*columns, strict=True))
    same = np.stack([first_equal(digests[:, column]) for column in range(digests.shape[1])], 1)
    record = np.unique(same[trusted, -1])
    same[num_images == 0] = -1
    start = np.cumsum(num_images) - num_images
    all_columns = {
        "start": start,
        "num_images": num_images,
        "kind": kind,
        "phash": phash,
        "dhash": dhash,
        "windows": windows,
    }
    distinct = {name: column[record] for name, column in all_columns.items()}
    return same, Contents(record=record, prints=read_prints(work), **distinct)


def read_prints(work: Path) -> Shaped[np.ndarray, " m"]:
    path = work / "prints"
    return np.memmap(path, FINGERPRINT, "r") if path.stat().st_size else np.empty(0, FINGERPRINT)


def _parts(band: int, contents: Contents) -> int:
    """Number of partitions of a band; the pairs do not depend on it."""
    return max(1, -(-len(contents.record) * BANDS[band].keys // ENTRIES_PER_PARTITION))


def _propose(contents: Contents, band: int, part: int, parts: int) -> Shaped[np.ndarray, " p"]:
    """Pairs of positions in `contents` that one partition of a band proposes."""
    filed = [np.empty(0, ENTRY)]
    for start in range(0, len(contents.record), _INDEXED_CHUNK):
        block = slice(start, start + _INDEXED_CHUNK)
        columns = (getattr(contents, name)[block] for name in ("kind", "phash", "dhash", "windows"))
        kind, *hashes = columns
        entries = make_entries(BANDS[band], np.arange(start, start + len(kind)), kind, *hashes)
        filed.append(entries[partition(entries, parts) == part])
    return candidates(BANDS[band], np.concatenate(filed))


def _confirm(contents: Contents, pairs: Shaped[np.ndarray, " p"], confirm: Confirm) -> Shaped[np.ndarray, " q"]:
    """Near pairs of records among pairs of positions in `contents`."""
    near = [np.empty(0, NEAR)]
    left, right = contents.num_images[pairs["left"]], contents.num_images[pairs["right"]]
    for count in np.unique(left):
        some = pairs[(left == count) & (right == count)]
        places = np.arange(count)
        sides = (contents.prints[contents.start[some[side]][:, None] + places] for side in ("left", "right"))
        near.append(confirm(some, *sides))
    confirmed = np.concatenate(near)
    for side in ("left", "right"):
        confirmed[side] = contents.record[confirmed[side]]
    return confirmed
