"""Scoring on Apache Beam, for folders that are too large for one machine. It writes the same bytes as `cascade`.

A worker copies a shard to its disk, scores it as `cascade` does, and stores the scores in the folder. Images are then
grouped by the keys of their hashes (`candidates`) to find near pairs. The folder may be on any file system that Beam
supports (`gs://bucket/folder` with the extra `apache-beam[gcp]`). `docs/data_at_scale.md` shows how to run it on
Dataflow.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Filter
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.shards import MANIFEST, RecordFolder, read_manifest
from data_pipeline.scoring import pair_scores, score_tables
from data_pipeline.scoring.candidates import BANDS, candidates, make_entries, partition, unique_pairs
from data_pipeline.scoring.cascade import ScoreReport, score_shard
from data_pipeline.scoring.hold_out import score_hold_out
from data_pipeline.scoring.pair_scores import Pairs, fingerprints, first_equal, write_pairs
from data_pipeline.scoring.pair_search import ENTRIES_PER_PARTITION, PairReport
from data_pipeline.scoring.pairs import NEAR, confirm_near
from data_pipeline.scoring.windows import WINDOWS

try:
    import apache_beam as beam
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    raise ValueError(
        "--runner needs Apache Beam: pip install 'apache-beam>=2.77,<3', or 'apache-beam[gcp]' for Dataflow"
    ) from None

RUNNERS = ("DirectRunner", "DataflowRunner")
_GROUP = 1 << 20  # records whose digests are compared at once
_PLACE = np.dtype([("high", np.uint64), ("low", np.uint64), ("record", np.int64)])
_HASHES = [("phash", np.uint64), ("dhash", np.uint64), ("windows", np.uint64, len(WINDOWS))]
_CONTENT = np.dtype([*_PLACE.descr, ("trusted", bool), ("kind", np.uint64), *_HASHES])


def score_with_beam(
    folder: str, runner: str, options: Sequence[str] = (), *, filters: Sequence[Filter] = CASCADE
) -> ScoreReport:
    """Scores a folder as `cascade.score` does, on a Beam runner.

    Args:
      folder: folder of records, as a path or an address such as gs://bucket/folder.
      runner: one of RUNNERS. DirectRunner is for trials: it works in this process and keeps everything in memory.
      options: options of the pipeline, such as `--project=NAME`.
      filters: filters to run.

    Raises:
      ValueError: for an unknown runner, for filters whose model needs an accelerator, or if the folder is incomplete.
    """
    if runner not in RUNNERS:
        raise ValueError(f"runner is {runner!r}; choose one of {RUNNERS}")
    active = tuple(filter for filter in filters if filter.can_score)
    if device := [filter.name for filter in active if filter.on_device]:
        raise ValueError(f"filters {device} need the accelerator of this machine; run them without --runner")
    with tempfile.TemporaryDirectory() as local:
        _fetch(folder, MANIFEST, local)
        shards = read_manifest(local)
        count = sum(shard.records for shard in shards)
        pipeline = _pipeline(runner, options)
        pipeline | beam.Create(range(len(shards))) | beam.Reshuffle() | beam.ParDo(_ScoreShard(folder, active))
        scored = dict.fromkeys([filter.name for filter in active], 0)
        for counter in _run(pipeline).metrics().query()["counters"]:
            if counter.key.metric.namespace == _ScoreShard.NAMESPACE:
                scored[counter.key.metric.name] += counter.result
        needs = {filter.name: filter.needs for filter in filters if not filter.can_score}
        pairs = None
        if {DUPLICATES.name, ENTROPY.name} <= scored.keys() and not _pairs_are_complete(folder, local):
            pipeline = _pipeline(runner, options)
            _search(pipeline, folder, [shard.records for shard in shards])
            counters = {c.key.metric.name: c.result for c in _run(pipeline).metrics().query()["counters"]}
            pairs = PairReport(count, counters.get("contents", 0), counters.get("near", 0))
    if {DUPLICATES.name, ENTROPY.name} <= scored.keys() and "://" not in folder:  # else after `scores/` was copied
        score_hold_out(folder, workers=os.cpu_count() or 1)
    return ScoreReport(count, scored, needs, pairs)


def _pipeline(runner: str, options: Sequence[str]) -> "beam.Pipeline":
    if runner == "DirectRunner":  # for this name, Beam would first try to download another runner, Prism
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        return beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(options)))
    return beam.Pipeline(runner=runner, options=PipelineOptions(list(options), save_main_session=False))


def _run(pipeline: "beam.Pipeline") -> "beam.runners.runner.PipelineResult":
    result = pipeline.run()
    result.wait_until_finish()
    return result


class _OnLocalCopies(beam.DoFn):
    """Works on copies of the folder's files on the worker's disk."""

    def __init__(self, folder: str):
        self.folder = folder

    def setup(self) -> None:
        self.local = tempfile.mkdtemp(prefix="qi2-")
        _fetch(self.folder, MANIFEST, self.local)
        self.shards = read_manifest(self.local)

    def teardown(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)


class _ScoreShard(_OnLocalCopies):
    """Computes the missing scores of a shard, given its number, and stores them in the folder."""

    NAMESPACE = "scored"

    def __init__(self, folder: str, filters: tuple[Filter, ...]):
        super().__init__(folder)
        self.filters = filters

    def process(self, number: int) -> None:
        shard, missing = self.shards[number], []
        for filter in self.filters:
            names = [_name(self.local, path) for path in score_tables.paths(self.local, filter, shard)]
            if all(_exists(self.folder, name) for name in names):
                for name in names:
                    _fetch(self.folder, name, self.local)
            if not score_tables.is_complete(self.local, filter, shard):
                missing.append(filter)
        if missing:
            _fetch(self.folder, shard.file, self.local)
            for _ in score_shard(RecordFolder(self.local), number, tuple(missing)):
                pass
            os.unlink(Path(self.local, shard.file))
        for filter in missing:
            for path in score_tables.paths(self.local, filter, shard):  # the marker comes last
                _store(self.folder, _name(self.local, path), self.local)
            beam.metrics.Metrics.counter(self.NAMESPACE, filter.name).inc(shard.records)
        shutil.rmtree(Path(self.local, "scores"), ignore_errors=True)


def _search(pipeline: "beam.Pipeline", folder: str, records: Sequence[int]) -> None:
    """Searches for pairs as `pair_search` does, grouped by keys."""
    starts = np.concatenate([[0], np.cumsum(records)]).astype(np.int64)
    seen = (
        pipeline
        | "shards" >> beam.Create(range(len(records)))
        | beam.Reshuffle()
        | beam.ParDo(_Fingerprints(folder, starts)).with_outputs(
            "images", *(f"places{column}" for column in range(len(pair_scores.SAME)))
        )
    )
    grouped = [
        seen[f"places{column}"] | f"group by {name}" >> beam.GroupByKey()
        for column, name in enumerate(pair_scores.SAME)
    ]
    blocks = [
        groups | f"first of {name}" >> beam.MapTuple(partial(_first_of_group, column=column))
        for column, (name, groups) in enumerate(zip(pair_scores.SAME, grouped, strict=True))
    ]
    contents = grouped[pair_scores.SAME.index("fingerprints")] | beam.FlatMapTuple(_contents)
    confirmed = (
        contents
        | beam.FlatMap(partial(_index, total=int(starts[-1])))
        | "group by key" >> beam.GroupByKey()
        | beam.FlatMapTuple(_candidates)
        | "by shard of the left" >> beam.FlatMap(partial(_by_shard, starts=starts))
    )
    confirmed = (
        {"pairs": confirmed, "images": seen["images"]}
        | "join left" >> beam.CoGroupByKey()
        | beam.FlatMapTuple(partial(_attach_left_images, starts=starts))
        | "by shard of the right" >> beam.FlatMap(partial(_by_shard_with_images, starts=starts))
    )
    confirmed = (
        {"pairs": confirmed, "images": seen["images"]}
        | "join right" >> beam.CoGroupByKey()
        | beam.FlatMapTuple(partial(_confirm, starts=starts))
    )
    same = tuple(blocks) | beam.Flatten()
    sides = (beam.pvalue.AsIter(same), beam.pvalue.AsIter(confirmed))
    pipeline | "one writer" >> beam.Create([None]) | beam.ParDo(_Write(folder), *sides, total=int(starts[-1]))


class _Fingerprints(_OnLocalCopies):
    """Yields the image fingerprints of a shard, given its number, and its digests by the groups that compare them."""

    def __init__(self, folder: str, starts: np.ndarray):
        super().__init__(folder)
        self.starts = starts

    def process(self, number: int) -> Iterator[Any]:  # Beam reads the annotation as the type of the main output
        shard = self.shards[number]
        for filter in (DUPLICATES, ENTROPY):
            for path in score_tables.paths(self.local, filter, shard):
                _fetch(self.folder, _name(self.local, path), self.local)
        prints = fingerprints(self.local, shard)
        shutil.rmtree(Path(self.local, "scores"))
        yield beam.pvalue.TaggedOutput("images", (number, (prints.num_images, prints.prints)))
        whole = np.flatnonzero(prints.num_images)
        places = np.empty(len(whole), _CONTENT)
        places["record"] = self.starts[number] + whole
        places["trusted"], places["kind"] = prints.trusted[whole], prints.kind[whole]
        for (name, *_), hashes in zip(_HASHES, prints.hashes(), strict=True):
            places[str(name)] = hashes[whole]
        parts = np.uint64(-(-int(self.starts[-1]) // _GROUP))
        for column, name in enumerate(pair_scores.SAME):
            places["high"], places["low"] = prints.same[whole, column].T
            part = places["low"] % parts
            for group in np.unique(part):
                some = places[part == group]
                kept = some if name == "fingerprints" else some[list(_PLACE.names or ())].astype(_PLACE)
                yield beam.pvalue.TaggedOutput(f"places{column}", (int(group), kept))


def _concatenate_sorted(blocks: Iterable[np.ndarray], dtype: np.dtype, *order: str) -> np.ndarray:
    rows = np.concatenate([np.empty(0, dtype), *blocks])
    return rows[np.lexsort(tuple(rows[name] for name in order[::-1]))]


def _first_records(places: np.ndarray) -> np.ndarray:
    return places["record"][first_equal(np.stack([places["high"], places["low"]], 1))]


def _first_of_group(_: int, blocks: Iterable[np.ndarray], *, column: int) -> tuple[int, np.ndarray, np.ndarray]:
    """For the records of a group, the first record with the same digest."""
    blocks = list(blocks)
    places = _concatenate_sorted(blocks, blocks[0].dtype, "record")
    return column, places["record"], _first_records(places)


def _contents(_: int, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The records to compare: the first with each fingerprint that at least one trusted record has."""
    places = _concatenate_sorted(blocks, _CONTENT, "record")
    first = _first_records(places)
    chosen = np.unique(first[places["trusted"]])
    beam.metrics.Metrics.counter("pairs", "contents").inc(len(chosen))
    yield places[np.searchsorted(places["record"], chosen)]


def _index(contents: np.ndarray, *, total: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    for number, band in enumerate(BANDS):
        entries = make_entries(band, *(contents[name] for name in ("record", "kind", "phash", "dhash", "windows")))
        place = partition(entries, max(1, -(-total * band.keys // ENTRIES_PER_PARTITION)))
        for part in np.unique(place):
            yield (number, int(part)), entries[place == part]


def _candidates(place: tuple[int, int], blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    entries = np.concatenate(list(blocks))
    pairs = candidates(BANDS[place[0]], entries[np.lexsort((entries["window"], entries["image"]))])
    if len(pairs):
        yield pairs


def _by_shard(pairs: np.ndarray, *, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    shard = np.searchsorted(starts, pairs["left"], side="right") - 1
    for number in np.unique(shard):
        yield int(number), pairs[shard == number]


def _images_of(grouped: dict, records: np.ndarray, start: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Fingerprints of the images of records in one shard.

    Yields:
      For each number of images per record: the number, positions in `records`, and FINGERPRINT [positions, number].
    """
    ((counts, prints),) = grouped["images"]
    first, here = np.cumsum(counts) - counts, records - start
    for number in np.unique(counts[here]):
        at = np.flatnonzero(counts[here] == number)
        yield int(number), at, prints[first[here[at]][:, None] + np.arange(number)]


def _attach_left_images(shard: int, grouped: dict, *, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Candidates with the fingerprints of their left records."""
    if grouped["pairs"]:
        pairs = unique_pairs(np.concatenate(list(grouped["pairs"])))  # several bands may propose the same pair
        for _, at, images in _images_of(grouped, pairs["left"], int(starts[shard])):
            yield pairs[at], images


def _by_shard_with_images(
    attached: tuple[np.ndarray, np.ndarray], *, starts: np.ndarray
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    pairs, images = attached
    shard = np.searchsorted(starts, pairs["right"], side="right") - 1
    for number in np.unique(shard):
        yield int(number), (pairs[shard == number], images[shard == number])


def _confirm(shard: int, grouped: dict, *, starts: np.ndarray) -> Iterator[np.ndarray]:
    for pairs, left in grouped["pairs"]:
        for number, at, right in _images_of(grouped, pairs["right"], int(starts[shard])):
            if number == left.shape[1]:
                yield confirm_near(pairs[at], left[at], right)


class _Write(_OnLocalCopies):
    """Stores equal and near records in the tables of the folder."""

    def process(
        self,
        _: None,
        blocks: Iterable[tuple[int, np.ndarray, np.ndarray]],
        confirmed: Iterable[np.ndarray],
        *,
        total: int,
    ) -> None:
        same = np.full((total, len(pair_scores.SAME)), -1, np.int64)
        for column, record, first in blocks:
            same[record, column] = first
        near = _concatenate_sorted(confirmed, NEAR, "left", "right")
        beam.metrics.Metrics.counter("pairs", "near").inc(len(near))
        write_pairs(self.local, Pairs(same, near))
        for path in pair_scores.paths(self.local):  # the marker comes last
            _store(self.folder, _name(self.local, path), self.local)


def _pairs_are_complete(folder: str, local: str) -> bool:
    names = [_name(local, path) for path in pair_scores.paths(local)]
    if not all(_exists(folder, name) for name in names):
        return False
    for name in names:
        _fetch(folder, name, local)
    return pair_scores.are_complete(local)


def _name(local: str, path: Path) -> str:
    return path.relative_to(local).as_posix()


def _exists(folder: str, name: str) -> bool:
    return FileSystems.exists(FileSystems.join(folder, name))


def _fetch(folder: str, name: str, local: str) -> None:
    source, target = FileSystems.join(folder, name), Path(local, name)
    if not FileSystems.exists(source):
        raise ValueError(f"{source} does not exist; {folder} is not a complete folder of records")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileSystems.open(source, "application/octet-stream", "uncompressed") as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


def _store(folder: str, name: str, local: str) -> None:
    """Copies a file atomically: under a temporary name first."""
    target = FileSystems.join(folder, name)
    if "://" not in folder:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}.partial"
    with open(Path(local, name), "rb") as file, FileSystems.create(partial, "application/octet-stream") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    FileSystems.rename([partial], [target])
