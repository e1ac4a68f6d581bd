"""Scores on disk: one file of JSON lines per filter and shard, beside the records.

    DIR/scores/<filter>/records-00000-of-00003.jsonl    {"key": ..., "<filter>.<column>": ..., ...} per record, in order
    DIR/scores/<filter>/records-00000-of-00003.done.json

The second file is written after the first. It names the filter's version and the digest of the shard, so it says both
that the scores are complete and what they are valid for; anything else counts as missing and is computed again.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.atomic import write_atomic, write_json_atomic
from data_pipeline.filters import Filter
from data_pipeline.shards import Shard, read_manifest


def is_complete(folder: Path | str, filter: Filter, shard: Shard) -> bool:
    """Whether the scores of this shard by this version of the filter are there."""
    scores, marker = _paths(Path(folder), filter, shard)
    try:
        return scores.is_file() and json.loads(marker.read_bytes()) == _validity(filter, shard)
    except (OSError, ValueError):
        return False


def write_scores(folder: Path | str, filter: Filter, shard: Shard, keys: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes one dict of the filter's columns per record of the shard, and then the marker."""
    assert len(keys) == len(rows) == shard.records, f"{filter.name} gave {len(rows)} scores for {shard.records} records"
    scores, marker = _paths(Path(folder), filter, shard)
    scores.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, row in zip(keys, rows, strict=True):
        assert row.keys() == filter.columns.keys(), f"{filter.name} gave {sorted(row)}, not {sorted(filter.columns)}"
        prefixed = {f"{filter.name}.{column}": row[column] for column in filter.columns}
        lines.append(json.dumps({"key": key} | prefixed, allow_nan=False) + "\n")
    write_atomic(scores, "".join(lines).encode())
    write_json_atomic(marker, _validity(filter, shard))


def read_scores(folder: Path | str, filters: Sequence[Filter]) -> Iterator[dict]:
    """Yields one dict per record, in the order of the records: its key and the columns of all filters.

    Raises:
      ValueError: when scores are missing or stale (naming the filter and the way out), or do not match the records.
    """
    shards = read_manifest(folder)
    for filter in filters:
        missing = sum(not is_complete(folder, filter, shard) for shard in shards)
        if missing:
            raise ValueError(
                f"{folder}: filter {filter.name!r} version {filter.version} has not scored {missing} of {len(shards)} "
                "shards; run data_pipeline.cascade.score on the folder first"
            )
    for shard in shards:
        files = [_paths(Path(folder), filter, shard)[0] for filter in filters]
        columns = [path.read_text(encoding="utf-8").splitlines() for path in files]
        for path, lines in zip(files, columns, strict=True):
            if len(lines) != shard.records:
                raise ValueError(f"{path} has {len(lines)} lines for {shard.records} records; delete it, score again")
        for record in zip(*columns, strict=True):
            rows = [json.loads(line) for line in record]
            if len({row["key"] for row in rows}) != 1:
                raise ValueError(f"{files} disagree about the keys; delete {Path(folder) / 'scores'}, score again")
            yield {name: value for row in rows for name, value in row.items()}


def _paths(folder: Path, filter: Filter, shard: Shard) -> tuple[Path, Path]:
    stem = Path(folder, "scores", filter.name, shard.file.removesuffix(".arrayrecord"))
    return stem.with_name(stem.name + ".jsonl"), stem.with_name(stem.name + ".done.json")


def _validity(filter: Filter, shard: Shard) -> dict:
    return {"filter": filter.name, "version": filter.version, "shard": shard.file, "digest": shard.digest}
