"""The selection index: which records a stage trains on, as a Parquet file."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.funnel import Step, Table, table
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.runtime.atomic import write_atomic

INDEX = "selection.parquet"  # of a folder of records, unless it is called otherwise


@dataclass(frozen=True)
class Kept:
    """A kept record.

    Attributes:
      key, index: its name, and its position in the `RecordFolder`.
      width, height: upright size in pixels.
      captions: which of its captions to use: of an edit the instructions.
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
    """Why a record was dropped: the step, the reason, and for duplicates the key of the record kept in its place."""

    step: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
      thresholds: what was asked.
      kept: records in the order of the folder.
      dropped: the others, by key.
      steps: the funnel of counts.
      not_scored: filters that could drop nothing because their model was absent, and what they need.
      trials: filters whose scores are for trials only, and what this selection did with them.
      records: digest of the records, see `shards.digest_of`.
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

    def table(self) -> Table:
        """The funnel, with a caption that names filters without scores and filters for trials only."""
        view = table("selection", self.steps)
        lines = [f"{name.upper()} WAS NOT SCORED, nothing is dropped: {x}" for name, x in self.not_scored.items()]
        lines += [f"{name.upper()} {text}" for name, text in self.trials.items()]
        if lines:
            view.caption = "\n".join(lines)
        return view

    def to_dict(self) -> dict:
        """Thresholds, filter versions and funnel, for JSON; without the list of keys, which may be long."""
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
    """Writes the kept records as Parquet, a row each, with thresholds and funnel as JSON in the file's metadata."""
    rows = [asdict(kept) | {"captions": list(kept.captions)} for kept in selection.kept]
    types = {"key": pa.string(), "captions": pa.list_(pa.int64())}
    schema = pa.schema([(field.name, types.get(field.name, pa.int64())) for field in fields(Kept)])
    rows_table = pa.Table.from_pylist(rows, schema.with_metadata({"selection": json.dumps(selection.to_dict())}))
    buffer = io.BytesIO()
    pq.write_table(rows_table, buffer, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def read_selection(path: Path) -> Iterator[Kept]:
    """Kept records in the order of their folder, read piece by piece.

    Raises:
      ValueError: if the file is missing or no selection.
    """
    try:
        for batch in _open_selection(path).iter_batches():
            for row in batch.to_pylist():
                yield Kept(**row | {"captions": tuple(row["captions"])})
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None


def selection_facts(path: Path) -> dict:
    """What a selection says of itself, as `Selection.to_dict`; raises as `read_selection`."""
    file = _open_selection(path)
    try:
        return json.loads(file.schema_arrow.metadata[b"selection"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None


def _open_selection(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `qi2 data select` first")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a selection; select again: {error}") from None
