"""The selection on disk: which records a stage trains on, and why the others were dropped.

selection.parquet           a row per kept record (`Kept`); thresholds and funnel are in the file's metadata
selection.dropped.parquet   a row per dropped record: key, step, reason and, for duplicates, `duplicate_of`: the key
                            of the record that was kept in its place
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.funnel import Step, Table, table
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.runtime.atomic import write_atomic

INDEX = "selection.parquet"  # in a folder of records, unless `--out` names another file
_DROPPED = pa.schema([(name, pa.string()) for name in ("key", "step", "reason", "duplicate_of")])


@dataclass(frozen=True)
class Kept:
    """A kept record.

    Attributes:
      key: name of the record.
      index: position in the `RecordFolder`.
      width, height: upright size in pixels.
      captions: numbers of the captions to use; for an edit, of its instructions.
      conditions: number of condition images.
    """

    key: str
    index: int
    width: int
    height: int
    captions: tuple[int, ...]
    conditions: int = 0


@dataclass(frozen=True)
class Dropped:
    """Why a record was dropped: step, reason, and for a duplicate the key of the record that was kept instead."""

    step: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Selection:
    """The result of a selection.

    Attributes:
      thresholds: thresholds that were applied.
      kept: kept records in the order of the folder.
      dropped: other records, by key.
      steps: funnel of counts.
      not_scored: filters that dropped nothing because they have no scores, and what they need.
      trials: filters for trials only, and how this selection used their scores.
      records: digest of the records, see `shards.digest_of`.
      colours: number of images by the outcome of colour management (`decoding.colour.OUTCOMES`).
    """

    thresholds: Thresholds
    kept: tuple[Kept, ...]
    dropped: dict[str, Dropped]
    steps: tuple[Step, ...]
    not_scored: dict[str, str]
    trials: dict[str, str]
    records: str
    colours: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.kept)

    def table(self) -> Table:
        """The funnel; its caption lists filters without scores, filters for trials only, and colour profiles."""
        view = table("selection", self.steps)
        lines = [f"{name.upper()} WAS NOT SCORED, nothing is dropped: {x}" for name, x in self.not_scored.items()]
        lines += [f"{name.upper()} {text}" for name, text in self.trials.items()]
        profiles = {
            name: count for name, count in self.colours.items() if name in ("converted", "ignored", "unmanaged")
        }
        if profiles:
            lines.append("colour profiles: " + ", ".join(f"{count:,} {name}" for name, count in profiles.items()))
        view.caption = "\n".join(lines)
        return view

    def to_dict(self) -> dict:
        """Thresholds, filter versions, funnel and counts for JSON, without the list of keys, which may be long."""
        return {
            "records": self.records,
            "thresholds": asdict(self.thresholds),
            "filters": {filter.name: filter.version for filter in (*CASCADE, *TRIALS)},
            "not_scored": self.not_scored,
            "trials": self.trials,
            "colours": self.colours,
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
    """The file of dropped records that belongs to a selection."""
    return path.with_suffix(f".dropped{path.suffix}")


def read_dropped(path: Path) -> dict[str, Dropped]:
    """The records that a selection dropped, by key.

    Raises:
      ValueError: if the file is missing or damaged.
    """
    try:
        rows = _open_selection(dropped_path(path)).read().to_pylist()
        return {row.pop("key"): Dropped(**row) for row in rows}
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{dropped_path(path)} is damaged; run `qi2 data select` again: {error}") from None


def _write(path: Path, rows: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd", write_page_checksum=True)
    write_atomic(path, buffer.getvalue())


def read_selection(path: Path) -> Iterator[Kept]:
    """Yields kept records in the order of their folder, without reading the whole file at once.

    Raises:
      ValueError: if the file is missing or is not a selection.
    """
    try:
        for batch in _open_selection(path).iter_batches():
            for row in batch.to_pylist():
                yield Kept(**row | {"captions": tuple(row["captions"])})
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None


def selection_facts(path: Path) -> dict:
    """The `Selection.to_dict` in the metadata of a selection; raises the errors of `read_selection`."""
    file = _open_selection(path)
    try:
        return json.loads(file.schema_arrow.metadata[b"selection"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None


def _open_selection(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `qi2 data select` first")
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a selection; run `qi2 data select` again: {error}") from None
