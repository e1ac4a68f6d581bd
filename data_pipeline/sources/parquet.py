"""Parquet: one sample per row, images as bytes or as {bytes, path}, the form of Hugging Face datasets.

`layouts` maps columns to fields.
"""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.records.schema import MAX_CONDITIONS, Record
from data_pipeline.sources import layouts
from data_pipeline.sources.base import Ledger, Options, Refused, check_image, inner_path, is_name
from data_pipeline.sources.fields import Description, describe, make_record, merge, source_name
from data_pipeline.sources.layouts import read_values

BATCH_ROWS = 16
MAX_VALUES = 4096  # values in one row, including those in lists; a record has a few hundred at most
MAX_GROUP_VALUES = 20_000_000  # values of one column in a row group; nulls take memory, though no bytes in the file


class NoImageColumn(ValueError):
    """A table without a column of images."""

    def __init__(self, where: str, columns: list[str]):
        names = layouts.format_keys(columns)
        super().__init__(f"{where} has no column `image`, only {names}; name one with --column image=NAME")
        self.columns = columns


_READ_METADATA = """
import sys
import pyarrow.parquet as pq
metadata = pq.ParquetFile(sys.argv[1]).metadata
for group in map(metadata.row_group, range(metadata.num_row_groups)):
    for part in map(group.column, range(group.num_columns)):
        part.path_in_schema, part.num_values
"""


def read_parquet(path: Path, options: Options, ledger: Ledger, prefix: str | None = None) -> Iterator[Record]:
    """Records of one file, in order. Consecutive rows with the same key, image and conditions become one record.

    Args:
      path: path of the file.
      options: options of reading.
      ledger: counts of the source.
      prefix: prefix of all keys; None means the name of the file.

    Raises:
      NoImageColumn: if the file has no column of images.
      ValueError: if a column that the options name is missing.
    """
    if prefix is None:
        ledger.count_file(".parquet")
        prefix = path.stem
    done: set[str] = set()
    waiting: tuple[Record, Description] | None = None
    try:
        with pq.ParquetFile(path) as file:
            columns = map_columns(file.schema_arrow.names, options, str(path))
            _check_metadata(path)
            read = set(itertools.chain.from_iterable(columns.values()))
            ledger.count_unused([key for key in file.schema_arrow.names if key not in read], file.metadata.num_rows)
            ledger.bar.total = (ledger.bar.total or 0) + file.metadata.num_rows
            for number, row in _file_rows(file, columns, path.name, ledger):
                ledger.bar.update()
                name = f"{prefix}/{number:08d}"
                try:
                    if isinstance(row, Refused):
                        raise row
                    ledger.count_unused(layouts.unused_keys(row, columns))
                    record, described = row_to_record(read_values(row, columns), name, options, path.stem)
                    if waiting is not None and waiting[0].key == record.key and _same_images(waiting[0], record):
                        waiting = _merged(*waiting, described)
                        continue
                    if record.key in done:
                        raise Refused("duplicate_key")
                    done.add(record.key)
                    if waiting is not None:
                        ledger.count_lost(waiting[1].lost, waiting[0].key)
                        yield waiting[0]
                    waiting = record, described
                except Refused as error:
                    ledger.refuse(error, name)
    except (pa.ArrowException, OSError) as error:
        ledger.refuse("broken_file", f"{path.name}: {str(error)[:200]}")
    if waiting is not None:
        ledger.count_lost(waiting[1].lost, waiting[0].key)
        yield waiting[0]


def _same_images(first: Record, second: Record) -> bool:
    return first.image == second.image and first.conditions == second.conditions


def _merged(record: Record, described: Description, more: Description) -> tuple[Record, Description]:
    both = merge(described, more)
    return dataclasses.replace(record, captions=both.captions, tags=both.tags, licence=both.licence), both


def _check_metadata(path: Path) -> None:
    """Reads all metadata in another process, because damaged metadata can crash pyarrow.

    Raises:
      pa.ArrowInvalid: if that process crashes.
    """
    finished = subprocess.run([sys.executable, "-c", _READ_METADATA, str(path)], capture_output=True, check=False)
    if finished.returncode < 0:
        raise pa.ArrowInvalid("damaged metadata")


def _file_rows(
    file: pq.ParquetFile, columns: Mapping[str, tuple[str, ...]], name: str, ledger: Ledger
) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Yields the numbered rows of all row groups that are not too large."""
    names = sorted(set(itertools.chain.from_iterable(columns.values())))
    number = 0
    for group in range(file.num_row_groups):
        rows, values = _announced_size(file.metadata.row_group(group), names)
        if values > MAX_GROUP_VALUES:
            ledger.refuse("broken_file", f"{name}: row group {group} has {values} values in one column")
            number += rows
            ledger.bar.update(rows)
            continue
        for batch in file.iter_batches(BATCH_ROWS, [group], names):
            for row in _rows(batch):
                yield number, row
                number += 1


def _announced_size(group: pq.RowGroupMetaData, columns: Collection[str]) -> tuple[int, int]:
    """The number of rows, and the largest number of values that the metadata announces for these columns."""
    parts = [group.column(index) for index in range(group.num_columns)]
    read = [part for part in parts if any(f"{part.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    return group.num_rows, max((part.num_values for part in read), default=0)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Refused]:
    """Yields the rows of a batch as Python objects; a row that cannot be converted does not affect the others."""
    if sum(map(_count_values, batch.columns)) <= BATCH_ROWS * MAX_VALUES:
        try:
            yield from batch.to_pylist()
            return
        except Exception:  # the loop below finds the row
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
        except Exception:  # such as times out of range or unknown time zones: error types differ by column type
            converted = Refused("bad_metadata")
        yield converted


def _count_values(array: pa.Array) -> int:
    """The number of Python objects that an array converts to; a list of nulls takes no bytes in a file."""
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


def map_columns(present: list[str], options: Options, where: str) -> dict[str, tuple[str, ...]]:
    """Returns {field: columns} of a table.

    Raises:
      NoImageColumn: if no column contains images.
      ValueError: for unknown fields and missing columns.
    """
    layouts.check_columns(options.columns, present, where)
    columns = layouts.map_fields(present, options.columns, table=True)
    if "image" not in columns:
        raise NoImageColumn(where, present)
    return columns


def row_to_record(fields: dict[str, Any], name: str, options: Options, source: str) -> tuple[Record, Description]:
    """The record of a row, and its description.

    Raises:
      Refused: with a reason of `base.REASONS`.
    """
    limit = options.max_image_bytes
    images = fields.pop("conditions", [])
    if len(images) > MAX_CONDITIONS:
        raise Refused("bad_metadata")
    image, conditions = _image(fields.pop("image", None), limit), tuple(_image(value, limit) for value in images)
    key = fields.pop("key", None)
    if key is not None:
        name = f"{name.rpartition('/')[0]}/{inner_path(str(key))}"  # the prefix keeps keys of several files apart
    if not is_name(name):
        raise Refused("bad_name")
    described = describe(fields, options)
    return make_record(name, image, conditions, described, source_name(options, source)), described


def _image(value: object, limit: int) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Refused("missing_image")
    return check_image(data, limit)
