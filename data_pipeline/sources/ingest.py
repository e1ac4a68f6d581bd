"""Ingestion: image-text pairs and edits from outside become shards of records.

Image bytes are copied as they are; whether they decode is for the filters to say. Everything that cannot become a
record is counted with its reason and never stops the run. `data_pipeline.sources` says what can be read: also folders
of records, so that what was made apart can be joined.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline.funnel import Step, Table, Tally, table
from data_pipeline.records.schema import MAX_IMAGE_BYTES, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.sources import DEFAULTS, LOOKED_FOR, TABLES, Options, base, open_source, source_names


@dataclass(frozen=True)
class IngestReport:
    """What became of the sources: samples that each of them had, and how many were refused for which reason."""

    folder: str
    sources: tuple[Step, ...]

    @property
    def records(self) -> int:
        """Records written to `folder`."""
        return sum(source.entered - source.dropped.total for source in self.sources)

    @property
    def refused(self) -> Tally:
        """What all sources together were refused for."""
        return sum((source.dropped for source in self.sources), Tally())

    def table(self) -> Table:
        """A table of what was refused and why, for each source."""
        return table(f"ingested into {self.folder}", self.sources)

    def to_dict(self) -> dict:
        sources = [source.to_dict() for source in self.sources]
        return {"folder": self.folder, "records": self.records, "refused": self.refused.to_dict(), "sources": sources}


def ingest(
    src: Path | str | Sequence[Path | str],
    out: Path | str,
    options: Options = DEFAULTS,
    *,
    records_per_shard: int = 256,
    progress: bool = True,
) -> IngestReport:
    """Writes the samples of one or several sources, in their order, as shards to the new folder `out`.

    Of several sources every key begins with the name of its own (`sources.source_names`), so that keys stay unique.

    Memory does not grow with the size of a tar or Parquet file. A run that was killed leaves a folder without manifest,
    which the next run starts over: what it costs is reading and writing the bytes, since nothing is decoded here.

    Args:
      src: one source or several; see `sources.open_source`.
      records_per_shard: a shard is the unit of work of everything that follows.

    Raises:
      ValueError: when `src` is no source, or is named twice, nothing in it is usable, `out` already holds records, or a
        limit is wrong.
      OSError: when the disk is full. The folder is not complete then.
    """
    if not 0 < options.max_image_bytes <= MAX_IMAGE_BYTES:
        raise ValueError(f"max_image_bytes is {options.max_image_bytes}; choose between 1 and {MAX_IMAGE_BYTES}")
    sources = [src] if isinstance(src, str | Path) else list(src)
    parts = [open_source(source) for source in sources]
    if len({str(source) for source in sources}) < len(sources):
        raise ValueError(f"a source is named twice in {sources}; all of its records would be there twice")
    if options.columns and not any(reader in TABLES for part in parts for reader, _ in part):
        raise ValueError(f"columns {options.columns} are of a table; none of {sources} is Parquet or tfds:")
    names = source_names(sources)
    refused = [Tally() for _ in sources]
    written = [0] * len(sources)

    def records(bar: tqdm) -> Iterator[Record]:
        for number, name in enumerate(names):
            for reader, path in parts[number]:
                for record in reader(path, options, refused[number], bar):
                    key = record.key if len(sources) == 1 else f"{name}/{record.key}"
                    if not base.is_name(key):
                        refused[number].add("bad_name", record.key)
                        continue
                    written[number] += 1
                    yield record if key == record.key else dataclasses.replace(record, key=key)

    with tqdm(desc="ingest", unit="img", disable=not progress, dynamic_ncols=True) as bar:
        stream = records(bar)
        first = next(stream, None)
        if first is None:
            where, found = ", ".join(map(str, sources)), sum(refused, Tally()).counts or "nothing"
            raise ValueError(f"no usable image-caption pair in {where}: looked for {LOOKED_FOR}; refused: {found}")
        write_shards(out, itertools.chain([first], stream), records_per_shard=records_per_shard)
    labels = names if len(sources) > 1 else ["ingest"]
    steps = (
        Step(label, count + tally.total, tally) for label, count, tally in zip(labels, written, refused, strict=True)
    )
    return IngestReport(str(out), tuple(steps))
