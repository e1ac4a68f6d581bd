"""Parquet: one sample per row, images as bytes or as {bytes, path}, the form of Hugging Face datasets.

Columns are named like the keys of `base.describe`, and `image`, `conditions` (a list of images, or one) and `key`;
`Options.columns` says which other column holds one of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records import MAX_CONDITIONS, Record
from data_pipeline.sources import base
from data_pipeline.sources.base import Options, Refused

FIELDS = ("image", "text", "captions", "instruction", "conditions", "tags", "licence", "key")
BATCH_ROWS = 16


def read_parquet(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """Records of one file, in its order.

    Raises:
      ValueError: if it has no column of images, or a column that the options name is missing.
    """
    done: set[str] = set()
    try:
        with pq.ParquetFile(path) as file:
            columns = columns_of(file.schema_arrow.names, options, str(path))
            bar.total = (bar.total or 0) + file.metadata.num_rows
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=sorted(set(columns.values()))):
                for row in batch.to_pylist():
                    bar.update()
                    name = f"{path.stem}/{number:08d}"
                    number += 1
                    try:
                        found = {field: row[column] for field, column in columns.items() if row[column] is not None}
                        made = record_of_row(found, name, options, path.stem)
                        if made.key in done:
                            raise Refused("duplicate_key")
                        done.add(made.key)
                        yield made
                    except Refused as error:
                        refused.add(str(error), name)
    except (pa.ArrowException, OSError) as error:
        refused.add("broken_file", f"{path.name}: {str(error)[:200]}")


def columns_of(present: list[str], options: Options, where: str) -> dict[str, str]:
    """{field: column} of a table.

    Raises:
      ValueError: for fields that we do not know, columns that are not there, or no image.
    """
    unknown = sorted(set(options.columns) - set(FIELDS))
    absent = sorted(set(options.columns.values()) - set(present))
    if unknown or absent:
        raise ValueError(f"{where} has the columns {present}, without {absent}; fields are {FIELDS}, without {unknown}")
    columns = {field: field for field in FIELDS if field in present} | options.columns
    if "image" not in columns:
        raise ValueError(f"{where} has no column `image`, only {present}; name one with --column image=NAME")
    if "text" in options.columns:
        columns.pop("captions", None)
    return columns


def record_of_row(found: dict[str, Any], name: str, options: Options, source: str) -> Record:
    """A record from the fields of a row.

    Raises:
      Refused: with a reason of `base.REASONS`.
    """
    limit = options.max_image_bytes
    images = found.pop("conditions", [])
    images = images if isinstance(images, list) else [images]
    if len(images) > MAX_CONDITIONS:
        raise Refused("bad_metadata")
    image, conditions = _image(found.pop("image", None), limit), tuple(_image(value, limit) for value in images)
    key = found.pop("key", None)
    if key is not None:
        name = base.inner_path(str(key))
    if isinstance(found.get("tags"), str):
        found["tags"] = [found["tags"]]
    if isinstance(found.get("text"), list):
        found["captions"] = found.pop("text")
    return base.record(name, image, conditions, base.describe(found, options.licence), options.source or source)


def _image(value: object, limit: int) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Refused("missing_image")
    if len(data) > limit:
        raise Refused("too_large")
    return data
