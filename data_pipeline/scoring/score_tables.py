"""Scores on disk: one Parquet file per filter and shard, in the folder of records.

    DIR/scores/<filter>/records-00000-of-00003.parquet     columns key, <filter>.<column>, ..; a row per record
    DIR/scores/<filter>/records-00000-of-00003.done.json   the marker, written after the table

The marker contains the filter's version and the digests of its model, of the shard and of the table. It shows that the
scores are complete and for what they are valid. Scores without a matching marker count as missing and are computed
again. Reading compares the table with its digest; markers of earlier versions have none.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.base import Filter
from data_pipeline.records.shards import Shard, read_manifest
from qi2_jax.runtime.atomic import write_atomic, write_json_atomic

TABLE = "table"  # key of the marker for the table's digest
_SCALARS = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
_TYPES = _SCALARS | {list[kind]: pa.list_(arrow) for kind, arrow in _SCALARS.items()}  # type: ignore[valid-type]


def is_complete(folder: Path | str, filter: Filter, shard: Shard) -> bool:
    """Whether this version of the filter has scored the whole shard."""
    scores, marker = paths(folder, filter, shard)
    try:
        return scores.is_file() and _read_marker(marker) == _validity(filter, shard)
    except (OSError, ValueError):
        return False


def _read_marker(path: Path) -> dict:
    """The marker without the digest of the table. Raises OSError, or a ValueError for anything but a JSON object."""
    marker = json.loads(path.read_bytes())
    if not isinstance(marker, dict):
        raise ValueError(f"{path} is not a JSON object")
    marker.pop(TABLE, None)
    return marker


def unscored(folder: Path | str, filters: Sequence[Filter]) -> dict[str, str]:
    """Optional filters that have not scored all shards, and what they need.

    Scores by a model that this machine does not have also count.

    Raises:
      ValueError: if the shards were scored by different models.
    """
    shards, missing = read_manifest(folder), {}
    for filter in (filter for filter in filters if filter.optional):
        models = {_model(Path(folder), filter, shard) for shard in shards}
        if None in models:
            missing[filter.name] = filter.needs
        elif len(models) > 1:
            raise ValueError(
                f"{folder}: {len(models)} different models scored {filter.name!r}; run `qi2 data score` again"
            )
    return missing


def _model(folder: Path, filter: Filter, shard: Shard) -> str | None:
    """Digest of the model with which this version of a filter scored a shard; None if it has not."""
    try:
        marker = _read_marker(paths(folder, filter, shard)[1])
        return marker["model"] if marker == _validity(filter, shard) | {"model": marker["model"]} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_scores(folder: Path | str, filter: Filter, shard: Shard, keys: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes the table and then the marker.

    Args:
      folder: folder of records.
      filter: filter that scored.
      shard: shard of the folder.
      keys, rows: key and columns of each record of the shard.
    """
    assert len(keys) == len(rows) == shard.records, f"{filter.name} gave {len(rows)} scores for {shard.records} records"
    scores, marker = paths(folder, filter, shard)
    scores.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        assert row.keys() == filter.columns.keys(), f"{filter.name} gave {sorted(row)}, not {sorted(filter.columns)}"
    columns = {"key": pa.array(keys, pa.string())}
    for name, (kind, _) in filter.columns.items():
        columns[f"{filter.name}.{name}"] = pa.array([row[name] for row in rows], _TYPES[kind])
    data = to_parquet(pa.table(columns))
    write_atomic(scores, data)
    write_json_atomic(marker, _validity(filter, shard) | {TABLE: hashlib.sha256(data).hexdigest()})


@contextlib.contextmanager
def naming_damage(tables: Path, folder: Path | str) -> Iterator[None]:
    """Turns what a damaged table raises while it is read into a ValueError that names the way out.

    Args:
      tables: folder of the table.
      folder: folder of records that was scored.
    """
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{tables} is damaged; delete it and run `qi2 data score {folder}` again: {error}") from None


def read_scores(folder: Path | str, filters: Sequence[Filter]) -> Iterator[dict]:
    """Reads the scores of a folder, in the order of its records.

    Yields:
      A dict per record: its key and the columns of all filters. Those of optional filters without scores are None.

    Raises:
      ValueError: if scores are missing or stale, or do not match the records.
    """
    shards, absent = read_manifest(folder), unscored(folder, filters)
    nothing = {f"{f.name}.{column}": None for f in filters if f.name in absent for column in f.columns}
    filters = [filter for filter in filters if filter.name not in absent]
    for filter in (filter for filter in filters if not filter.optional):
        missing = sum(not is_complete(folder, filter, shard) for shard in shards)
        if missing:
            raise ValueError(
                f"{folder}: filter {filter.name!r} version {filter.version} has not scored {missing} of {len(shards)} "
                f"shards; run `qi2 data score {folder}` first"
            )
    for shard in shards:
        tables = [_read(folder, filter, shard) for filter in filters]
        keys = tables[0].column("key")
        if not all(table.column("key").equals(keys) for table in tables):
            raise ValueError(
                f"the score tables of {shard.file} have different keys; delete {folder}/scores and run "
                f"`qi2 data score {folder}` again"
            )
        for rows in zip(*(table.to_pylist() for table in tables), strict=True):
            yield {name: value for row in rows for name, value in row.items()} | nothing


def read_shard_scores(folder: Path | str, filter: Filter, shard: Shard) -> pa.Table:
    """The columns of one filter for one shard, a row per record.

    Raises:
      ValueError: if they are missing, stale or damaged.
    """
    if not is_complete(folder, filter, shard):
        raise ValueError(
            f"{folder}: filter {filter.name!r} has not scored {shard.file}; run `qi2 data score {folder}` first"
        )
    return _read(folder, filter, shard)


def _read(folder: Path | str, filter: Filter, shard: Shard) -> pa.Table:
    path, marker = paths(folder, filter, shard)
    try:
        table = from_parquet(path.read_bytes(), json.loads(marker.read_bytes()).get(TABLE))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read; delete it and run `qi2 data score` again: {error}") from None
    expected = ["key", *(f"{filter.name}.{column}" for column in filter.columns)]
    if table.num_rows != shard.records or table.column_names != expected:
        raise ValueError(
            f"{path} has {table.num_rows} rows of {table.column_names}, not {shard.records} of {expected}; delete it "
            "and run `qi2 data score` again"
        )
    return table


def to_parquet(table: pa.Table) -> bytes:
    """A table as a compressed Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes, digest: str | None) -> pa.Table:
    """The table in a Parquet file.

    Raises:
      ValueError: if the SHA-256 of the file is not `digest`; None accepts any.
      pa.ArrowException: if the file is damaged.
    """
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("the file has changed since it was written")
    return pq.read_table(io.BytesIO(data))


def paths(folder: Path | str, filter: Filter, shard: Shard) -> tuple[Path, Path]:
    """The table and the marker of a shard."""
    stem = Path(folder, "scores", filter.name, shard.file.removesuffix(".arrayrecord"))
    return stem.with_name(stem.name + ".parquet"), stem.with_name(stem.name + ".done.json")


def _validity(filter: Filter, shard: Shard) -> dict:
    scorer = {"filter": filter.name, "version": filter.version, "model": filter.model}
    return scorer | {"shard": shard.file, "digest": shard.digest}
