"""Ingestion: image-text pairs and edits from outside become shards of records.

Image bytes are copied as they are; whether they decode is for the filters to say. Everything that cannot become a
record is counted with its reason and never stops the run. `data_pipeline.sources` says what can be read.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline.funnel import Step, Tally, table
from data_pipeline.records import MAX_IMAGE_BYTES, Record
from data_pipeline.shards import write_shards
from data_pipeline.sources import DEFAULTS, LOOKED_FOR, Options, open_source


@dataclass(frozen=True)
class IngestReport:
    """What became of a source: `records` written to `folder`; `refused`: how many for which reason, with examples."""

    folder: str
    records: int
    refused: Tally

    def table(self):
        """A `rich.table.Table` of what was refused and why."""
        return table(f"ingested into {self.folder}", (Step("ingest", self.records + self.refused.total, self.refused),))

    def to_dict(self) -> dict:
        return {"folder": self.folder, "records": self.records, "refused": self.refused.to_dict()}


def ingest(
    src: Path | str,
    out: Path | str,
    options: Options = DEFAULTS,
    *,
    records_per_shard: int = 256,
    progress: bool = True,
) -> IngestReport:
    """Writes the samples of a source, in its order, as shards to the new folder `out`.

    Memory does not grow with the size of a tar or Parquet file.

    Args:
      src: see `sources.open_source`.
      records_per_shard: a shard is the unit of work of everything that follows.

    Raises:
      ValueError: when `src` is no source, nothing in it is usable, `out` already holds records, or a limit is wrong.
        Nothing is written then.
    """
    if not 0 < options.max_image_bytes <= MAX_IMAGE_BYTES:
        raise ValueError(f"max_image_bytes is {options.max_image_bytes}; choose between 1 and {MAX_IMAGE_BYTES}")
    refused = Tally()
    parts = open_source(src)

    def records(bar: tqdm) -> Iterator[Record]:
        for reader, path in parts:
            yield from reader(path, options, refused, bar)

    with tqdm(desc="ingest", unit="img", disable=not progress, dynamic_ncols=True) as bar:
        stream = records(bar)
        first = next(stream, None)
        if first is None:
            found = refused.counts or "nothing"
            raise ValueError(f"no usable image-caption pair in {src}: looked for {LOOKED_FOR}; refused: {found}")
        shards = write_shards(out, itertools.chain([first], stream), records_per_shard=records_per_shard)
    return IngestReport(str(out), sum(shard.records for shard in shards), refused)
