"""Parquet: one sample per row, images as bytes or as {bytes, path}, the form of Hugging Face datasets.

Columns are named like the keys of `base.describe`, and `image`, `conditions` (a list of images, or one) and `key`;
`Options.columns` says which other column holds one of them.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import MAX_CONDITIONS, Record
from data_pipeline.sources import base
from data_pipeline.sources.base import Options, Refused

FIELDS = ("image", "text", "captions", "instruction", "conditions", "tags", "licence", "key")
BATCH_ROWS = 16
MAX_VALUES = 4096  # in one row, those in lists counted: a few hundred are the most that a record can hold
MAX_GROUP_VALUES = 20_000_000  # of one column in a row group: nulls take no bytes in a file, but memory


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
            for group in range(file.num_row_groups):
                rows, values = _size(file.metadata.row_group(group), columns.values())
                if values > MAX_GROUP_VALUES:
                    refused.add("broken_file", f"{path.name}: row group {group} holds {values} values in one column")
                    number += rows
                    bar.update(rows)
                    continue
                for batch in file.iter_batches(BATCH_ROWS, [group], sorted(set(columns.values()))):
                    for row in _rows(batch):
                        bar.update()
                        name = f"{path.stem}/{number:08d}"
                        number += 1
                        try:
                            if isinstance(row, Refused):
                                raise row
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


def _size(group: pq.RowGroupMetaData, columns: Collection[str]) -> tuple[int, int]:
    """Rows, and the most values that any part of these columns announces."""
    parts = [group.column(index) for index in range(group.num_columns)]
    read = [part for part in parts if any(f"{part.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    return group.num_rows, max((part.num_values for part in read), default=0)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Refused]:
    """The rows as Python objects; one that cannot be converted costs itself alone."""
    if sum(map(_count_values, batch.columns)) <= BATCH_ROWS * MAX_VALUES:
        try:
            yield from batch.to_pylist()
            return
        except Exception:  # which row it was is found out below
            pass
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        try:
            if sum(map(_count_values, row.columns)) > MAX_VALUES:
                raise Refused("bad_metadata")
            converted: dict[str, Any] | Refused = row.to_pylist()[0]
        except Refused as refusal:
            converted = refusal
        except UnicodeDecodeError:
            converted = Refused("not_utf8")
        except Exception:  # times out of range, unknown time zones, ..: every type has its own errors
            converted = Refused("bad_metadata")
        yield converted


def _count_values(array: pa.Array) -> int:
    """How many Python objects an array becomes: a list of nulls takes no bytes in a file, but as many objects."""
    if isinstance(array, pa.ExtensionArray):
        return _count_values(array.storage)
    kind, count = array.type, len(array)
    if pa.types.is_struct(kind):
        return count + sum(map(_count_values, array.flatten()))
    if pa.types.is_fixed_size_list(kind):
        return count + _count_values(array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return count + _count_values(array.values.slice(first, last - first))
    return count


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
        name = f"{name.rpartition('/')[0]}/{base.inner_path(str(key))}"  # unique among files
        if not base.is_name(name):
            raise Refused("bad_name")
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
