"""Records: a folder that an earlier ingestion or synthesis made. They keep their source, licence, captions and tags."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources.base import Options

PATTERNS = ("records-*.arrayrecord", "records-*.partial")  # the latter: an ingestion that was interrupted


def read_records(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """Records of a folder, in its order; a damaged shard costs what lies behind the damage.

    `Options.licence` is given to those without a licence; `Options.source` is for samples that have none yet.

    Raises:
      ValueError: if the folder is not complete.
    """
    records = RecordFolder(path)
    bar.total = (bar.total or 0) + len(records)
    done: set[str] = set()
    for number in range(len(records.shards)):
        for record in _readable(records, number, refused):
            bar.update()
            if max(map(len, (record.image, *record.conditions))) > options.max_image_bytes:
                refused.add("too_large", record.key)
            elif record.key in done:
                refused.add("duplicate_key", record.key)
            else:
                done.add(record.key)
                yield dataclasses.replace(record, licence=record.licence or options.licence)


def _readable(records: RecordFolder, shard: int, refused: Tally) -> Iterator[Record]:
    try:
        yield from records.read_shard(shard)
    except ValueError as error:
        refused.add("broken_file", str(error)[:200])
