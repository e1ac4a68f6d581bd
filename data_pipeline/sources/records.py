"""Folders of records from an earlier ingestion or synthesis. Records keep their source, licence, captions and tags."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources.base import Ledger, Options

PATTERNS = ("records-*.arrayrecord", "records-*.partial")  # an interrupted ingestion leaves partial files


def read_records(path: Path, options: Options, ledger: Ledger) -> Iterator[Record]:
    """Records of a folder, in order; in a damaged shard, records after the damage are lost.

    Records without a licence get `Options.licence`; `Options.source` does not change their source.

    Raises:
      ValueError: if the folder is incomplete.
    """
    records = RecordFolder(path)
    ledger.bar.total = (ledger.bar.total or 0) + len(records)
    done: set[str] = set()
    for number in range(len(records.shards)):
        ledger.count_file(".arrayrecord")
        for record in _readable(records, number, ledger):
            ledger.bar.update()
            if max(map(len, (record.image, *record.conditions))) > options.max_image_bytes:
                ledger.refuse("too_large", record.key)
            elif record.key in done:
                ledger.refuse("duplicate_key", record.key)
            else:
                done.add(record.key)
                yield dataclasses.replace(record, licence=record.licence or options.licence)


def _readable(records: RecordFolder, shard: int, ledger: Ledger) -> Iterator[Record]:
    try:
        yield from records.read_shard(shard)
    except ValueError as error:
        ledger.refuse("broken_file", str(error)[:200])
