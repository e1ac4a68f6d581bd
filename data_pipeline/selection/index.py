"""The selection on disk: which records a stage trains on, and why it does not train on the others.

selection.parquet           a row per kept record (`Kept`); thresholds and funnel are in the file's metadata
selection.dropped.parquet   a row per other record: key, step, reason and, for duplicates, `duplicate_of`: the key
                            of the record that was kept in its place
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.funnel import Step, table
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.runtime.atomic import write_atomic

INDEX = "selection.parquet"  # in a folder of records, unless `--out` names another file
_DROPPED = pa.schema([(name, pa.string()) for name in ("key", "step", "reason", "duplicate_of")])


@dataclass(frozen=True)
class Kept:
    """A kept record.

    Attributes:
      key, index: Key of the record, and its position in the `RecordFolder`.
      width, height: Upright size in pixels.
      captions: Positions of the captions to use; those of an edit are its instructions.
      conditions: Number of condition images.
    """

    key: str
    index: int
    width: int
    height: int
    captions: tuple[int, ...]
    conditions: int = 0


@dataclass(frozen=True)
class Dropped:
    """Why a record was dropped: step and reason, and for duplicates the key of the record that was kept instead."""

    step: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Selection:
    """What a selection keeps and drops.

    Attributes:
      thresholds: Thresholds that were applied.
      kept: Kept records, in the order of the folder.
      dropped: The other records, by key.
      steps: Funnel of counts.
      not_scored: Filters that dropped nothing because they have no scores, and what they need.
      trials: Filters whose scores are for trials only, and what this selection did with them.
      records: Digest of the records, see `shards.digest_of`.
    """

    thresholds: Thresholds
    kept: tuple[Kept, ...]
    dropped: dict[str, Dropped]
    steps: tuple[Step, ...]
    not_scored: dict[str, str]
    trials: dict[str, str]
    records: str

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.kept)

    def table(self):
        """The funnel as a `rich.table.Table`, with warnings below about filters without scores and trials."""
        view = table("selection", self.steps)
        lines = [f"{name.upper()} WAS NOT SCORED, nothing is dropped: {x}" for name, x in self.not_scored.items()]
        lines += [f"{name.upper()} {text}" for name, text in self.trials.items()]
        if lines:
            view.caption, view.caption_style = "\n".join(lines), "bold red"
        return view

    def to_dict(self) -> dict:
        """Thresholds, filter versions and funnel, for JSON, without the keys of records."""
        return {
            "records": self.records,
            "thresholds": asdict(self.thresholds),
            "filters": {filter.name: filter.version for filter in (*CASCADE, *TRIALS)},
            "not_scored": self.not_scored,
            "trials": self.trials,
            "kept": len(self.kept),
            "funnel": [step.to_dict() for step in self.steps],
        }


def write_selection(path: Path, selection: Selection) -> None:
    """Writes the dropped records and then the kept ones, with thresholds and funnel as JSON in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dropped = [{"key": key, **asdict(why)} for key, why in selection.dropped.items()]
    _write(dropped_path(path), pa.Table.from_pylist(dropped, _DROPPED))
    rows = [asdict(kept) | {"captions": list(kept.captions)} for kept in selection.kept]
    types = {"key": pa.string(), "captions": pa.list_(pa.int64())}
    schema = pa.schema([(field.name, types.get(field.name, pa.int64())) for field in fields(Kept)])
    _write(path, pa.Table.from_pylist(rows, schema.with_metadata({"selection": json.dumps(selection.to_dict())})))


def dropped_path(path: Path) -> Path:
    """The file of the dropped records beside a selection."""
    return path.with_suffix(f".dropped{path.suffix}")


def read_dropped(path: Path) -> dict[str, Dropped]:
    """The records that a selection dropped, by key, from the file beside it.

    Raises:
      ValueError: if the file is missing or damaged.
    """
    try:
        rows = _open_selection(dropped_path(path)).read().to_pylist()
        return {row.pop("key"): Dropped(**row) for row in rows}
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise ValueError(f"{dropped_path(path)} is damaged; run `qi2 data select` again: {error}") from None


def _write(path: Path, rows: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_selection(path: Path) -> Iterator[Kept]:
    """Reads kept records batch by batch, in the order of their folder.

    Raises:
      ValueError: if the file is missing or not a selection.
    """
    try:
        for batch in _open_selection(path).iter_batches():
            for row in batch.to_pylist():
                yield Kept(**row | {"captions": tuple(row["captions"])})
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None


def selection_facts(path: Path) -> dict:
    """The `Selection.to_dict` in the metadata of a selection; raises what `read_selection` raises."""
    file = _open_selection(path)
    try:
        return json.loads(file.schema_arrow.metadata[b"selection"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None


def _open_selection(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `qi2 data select` first")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None
