"""Ingestion: image-text pairs and edits from outside become shards of records.

Image bytes are copied as they are; filters check later whether they decode. Anything that cannot become a record is
counted with its reason and never stops the run. `data_pipeline.sources` lists what can be read; folders of records are
included, so data sets can be joined.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_pipeline.funnel import Step, Table, Tally, table
from data_pipeline.records.schema import MAX_IMAGE_BYTES, Record
from data_pipeline.records.shards import check_output, write_new_shards
from data_pipeline.sources import DEFAULTS, LOOKED_FOR, Ledger, Options, Source, base, open_source, source_names


@dataclass(frozen=True)
class IngestReport:
    """The result of an ingestion.

    Attributes:
      folder: folder of the records.
      sources: number of samples in each source, and the refused ones by reason.
      lost: records that lost an optional part, by reason (`sources.LOST`).
      files: number of files in the sources, by suffix.
      unused: number of rows with a value under a key that no field reads, by key.
    """

    folder: str
    sources: tuple[Step, ...]
    lost: Tally
    files: dict[str, int]
    unused: dict[str, int]

    @property
    def records(self) -> int:
        """Number of records written to `folder`."""
        return sum(source.entered - source.dropped.total for source in self.sources)

    @property
    def refused(self) -> Tally:
        """Refusals in all sources."""
        return sum((source.dropped for source in self.sources), Tally())

    def table(self) -> Table:
        """The refusals of each source; the title counts files, lost parts and unused keys."""
        files = ", ".join(f"{count:,} {suffix}" for suffix, count in self.files.items())
        lost = (f"{count:,} {reason}" for reason, count in self.lost.counts.items())
        unused = ", ".join(f"{key!r} ({count:,})" for key, count in list(self.unused.items())[:20])
        title = f"ingested into {self.folder}" + (f"; files: {files}" if files else "")
        if self.lost.total:
            title += f"; records without an optional part: {', '.join(lost)}"
        if unused:
            title += f"; keys that no field reads (name one with --column): {unused}"
        return table(title, self.sources)

    def to_dict(self) -> dict:
        sources = [source.to_dict() for source in self.sources]
        parts = {"refused": self.refused.to_dict(), "lost": self.lost.to_dict(), "files": self.files}
        parts["unused_keys"] = self.unused
        return {"folder": self.folder, "records": self.records, **parts, "sources": sources}


def ingest(
    src: Path | str | Sequence[Path | str],
    out: Path | str,
    options: Options = DEFAULTS,
    *,
    records_per_shard: int = 256,
    progress: bool = True,
) -> IngestReport:
    """Writes the samples of one or more sources, in order, as shards to the new folder `out`.

    With several sources, every key begins with the name of its source (`sources.source_names`), so keys stay unique.

    Memory does not grow with the size of a tar or Parquet file. A killed run leaves a folder without manifest, and the
    next run starts over. This only costs copying the bytes, since nothing is decoded here.

    Args:
      src: one or more sources, see `sources.open_source`.
      out: new folder of records.
      options: options of reading.
      records_per_shard: number of records per file; later steps process whole shards.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if `src` is not a source or is named twice, nothing in it is usable, `out` already contains records or
        another process writes there, or a limit is invalid.
      OSError: if the disk is full; the folder is then incomplete.
    """
    if not 0 < options.max_image_bytes <= MAX_IMAGE_BYTES:
        raise ValueError(f"max_image_bytes is {options.max_image_bytes}; choose between 1 and {MAX_IMAGE_BYTES}")
    check_output(out, records_per_shard)
    sources = [src] if isinstance(src, str | Path) else list(src)
    if len({str(source) for source in sources}) < len(sources):
        raise ValueError(f"a source is named twice in {sources}; its records would be duplicated")
    names = source_names(sources)
    with tqdm(desc="ingest", unit="img", disable=not progress, dynamic_ncols=True) as bar:
        ledgers = [Ledger(bar) for _ in sources]
        opened = [open_source(source, options, ledger) for source, ledger in zip(sources, ledgers, strict=True)]
        if options.columns and not any(source.has_columns for source in opened):
            raise ValueError(
                f"--column {options.columns} applies to tables and metadata files, but {sources} contain neither"
            )
        written = [0] * len(sources)
        stream = _records(opened, names, ledgers, written)
        write_new_shards(
            out,
            stream,
            records_per_shard=records_per_shard,
            if_empty=lambda: _no_samples_message(sources, ledgers),
        )
    labels = names if len(sources) > 1 else ["ingest"]
    refused = [ledger.refused for ledger in ledgers]
    steps = (
        Step(label, count + tally.total, tally) for label, count, tally in zip(labels, written, refused, strict=True)
    )
    files = sum((ledger.files for ledger in ledgers), Counter())
    lost = sum((ledger.lost for ledger in ledgers), Tally())
    unused = sum((ledger.unused for ledger in ledgers), Counter())
    return IngestReport(str(out), tuple(steps), lost, dict(sorted(files.items())), dict(unused.most_common()))


def _records(
    opened: Sequence[Source], names: Sequence[str], ledgers: Sequence[Ledger], written: list[int]
) -> Iterator[Record]:
    """Yields the records of all sources and counts them in `written`."""
    for number, (source, name, ledger) in enumerate(zip(opened, names, ledgers, strict=True)):
        for record in source.records:
            key = record.key if len(names) == 1 else f"{name}/{record.key}"
            if not base.is_name(key):
                ledger.refuse("bad_name", record.key)
                continue
            written[number] += 1
            yield record if key == record.key else dataclasses.replace(record, key=key)


def _no_samples_message(sources: Sequence[Path | str], ledgers: Sequence[Ledger]) -> str:
    """The error message for sources without a usable sample; it lists the supported sources and the refusals."""
    refused = sum((ledger.refused for ledger in ledgers), Tally())
    refusals = [
        f"{count:,} {reason}, such as {refused.examples[reason][0]}" for reason, count in refused.counts.items()
    ]
    where = ", ".join(map(str, sources))
    hint = "; --without-captions accepts images without captions" if "missing_caption" in refused.counts else ""
    return (
        f"no usable image-caption pair in {where}: looked for {LOOKED_FOR}; refused: "
        f"{'; '.join(refusals) or 'nothing'}{hint}"
    )
