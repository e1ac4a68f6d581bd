"""The cascade: runs every filter on every shard, in worker processes. A new run adds only missing scores."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_pipeline.decoding.images import MAX_PIXELS, Decoded, UndecodableImage, decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate, Filter
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.funnel import Table
from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.scoring.hold_out import score_hold_out
from data_pipeline.scoring.pair_search import PairReport, score_pairs
from data_pipeline.scoring.score_tables import is_complete, write_scores
from data_pipeline.workers import process_pool

BATCH_RECORDS = 32
MAX_RECORD_PIXELS = 2 * MAX_PIXELS  # enough for ten sources of 12 million pixels and their target
BATCH_PIXELS = 50_000_000  # a batch with this many pixels ends before BATCH_RECORDS


@dataclass(frozen=True)
class ScoreReport:
    """The result of a run.

    Attributes:
      records: number of records in the folder.
      scored: number of records that each filter scored in this run.
      not_scored: filters without a model, and what they need.
      pairs: result of the search for duplicates; None if it was complete before.
    """

    records: int
    scored: dict[str, int]
    not_scored: dict[str, str] = field(default_factory=dict)
    pairs: PairReport | None = None

    def table(self) -> Table:
        """A table with a row per filter."""
        columns = ("filter", "scored before", "scored now")
        view = Table(f"scores of {self.records:,} records", columns, right=columns[1:])
        for name, count in self.scored.items():
            view.add_row(name, f"{self.records - count:,}", f"{count:,}")
        for name, needs in self.not_scored.items():
            view.add_row(f"{name}: not scored", "", needs)
        if self.pairs is not None:
            view.add_row("pairs", "", f"{self.pairs.near:,} near among {self.pairs.contents:,} different")
        return view

    def to_dict(self) -> dict:
        return {"records": self.records, "scored": self.scored, "not_scored": self.not_scored} | {
            "pairs": self.pairs and self.pairs.to_dict()
        }


def score(
    folder: Path | str,
    *,
    filters: Sequence[Filter] = CASCADE,
    workers: int | None = None,
    progress: bool = True,
) -> ScoreReport:
    """Scores the records of a folder (`score_tables`), then searches it for duplicates (`pair_scores`, `hold_out`).

    Only missing scores are computed, such as shards of a killed run, and filters that are new or have a new version.
    The result does not depend on the number of workers.

    Args:
      folder: folder of records.
      filters: filters to run.
      workers: number of processes; 1 means this process alone, None one per core. Worker processes import the calling
        script, which therefore needs the usual `if __name__ == "__main__":` around its work.
      progress: whether to show progress bars.

    Raises:
      ValueError: if the folder is not a complete folder of records, or a shard is corrupt.
      ChildProcessError: if a worker process dies.
      OSError: if the disk is full; finished shards are kept.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1, or None for one per core")
    records = RecordFolder(folder)
    not_scored = {filter.name: filter.needs for filter in filters if not filter.can_score}
    scored = {filter.name: 0 for filter in filters if filter.can_score}
    # One process owns a device, so the filters that need it run in a second pass, in this process.
    for on_device, title in ((False, "score"), (True, "score on device")):
        active = [filter for filter in filters if filter.can_score and filter.on_device == on_device]
        tasks = []
        for number, shard in enumerate(records.shards):
            missing = tuple(filter for filter in active if not is_complete(folder, filter, shard))
            if missing:
                tasks.append((number, missing))
            for filter in missing:
                scored[filter.name] += shard.records
        total = sum(records.shards[number].records for number, _ in tasks)
        count = 1 if on_device else min(workers or os.cpu_count() or 1, len(tasks))
        with tqdm(total=total, desc=title, unit="img", disable=not progress or not tasks, dynamic_ncols=True) as bar:
            for done in _run(records, tasks, count):
                bar.update(done)
    pairs = None
    if {DUPLICATES.name, ENTROPY.name} <= scored.keys():
        pairs = score_pairs(folder, workers=workers or os.cpu_count() or 1, progress=progress)
        score_hold_out(folder, workers=workers or os.cpu_count() or 1, progress=progress)
    return ScoreReport(len(records), scored, not_scored, pairs)


def _run(records: RecordFolder, tasks: list[tuple[int, tuple[Filter, ...]]], workers: int) -> Iterator[int]:
    """Yields the number of records scored since the previous yield."""
    if workers <= 1:
        for number, filters in tasks:
            yield from score_shard(records, number, filters)
        return
    with process_pool(workers, "scoring") as pool:
        futures = [pool.submit(_score_whole_shard, records, number, filters) for number, filters in tasks]
        for future in as_completed(futures):
            yield future.result()


def _score_whole_shard(records: RecordFolder, number: int, filters: tuple[Filter, ...]) -> int:
    return sum(score_shard(records, number, filters))


def score_shard(records: RecordFolder, number: int, filters: tuple[Filter, ...]) -> Iterator[int]:
    """Scores one shard by some filters and writes the tables.

    Yields:
      The number of records in each batch.
    """
    keys: list[str] = []
    rows: dict[str, list[dict]] = {filter.name: [] for filter in filters}
    for batch in _batches(records.read_shard(number)):
        keys += [candidate.record.key for candidate in batch]
        for filter in filters:
            rows[filter.name] += _score_batch(filter, batch)
        yield len(batch)
    for filter in filters:
        write_scores(records.folder, filter, records.shards[number], keys, rows[filter.name])


def _score_batch(filter: Filter, batch: list[Candidate]) -> list[dict]:
    seen = [candidate for candidate in batch if filter.sees_broken or candidate.decoded is not None]
    scores = iter(filter.score(seen))
    nothing = dict.fromkeys(filter.columns)
    return [next(scores) if filter.sees_broken or candidate.decoded is not None else nothing for candidate in batch]


def _decode(record: Record) -> Candidate:
    images: list[Decoded] = []
    remaining_pixels = MAX_RECORD_PIXELS  # all images of a record are in memory at the same time
    for place, data in enumerate((record.image, *record.conditions)):
        try:
            images.append(decode_image(data, preview_first=True, max_pixels=min(remaining_pixels, MAX_PIXELS)))
        except UndecodableImage as failure:
            where = f"condition image {place - 1}: " if place else ""
            return Candidate(record, None, UndecodableImage(failure.reason, where + failure.detail))
        remaining_pixels -= math.prod(images[-1].size)
    return Candidate(record, images[0], None, tuple(images[1:]))


def _batches(records: Iterable[Record]) -> Iterator[list[Candidate]]:
    batch, pixels = [], 0
    for record in records:
        candidate = _decode(record)
        for decoded in (candidate.decoded, *candidate.conditions):
            pixels += math.prod(decoded.size) if decoded else 0
        batch.append(candidate)
        if len(batch) == BATCH_RECORDS or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
