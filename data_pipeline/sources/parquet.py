"""Parquet: one sample per row, images as bytes or as {bytes, path}, the form of Hugging Face datasets.

`layouts` says which column holds which field.
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
from data_pipeline.sources.fields import Described, describe, make_record, merge, name_of
from data_pipeline.sources.layouts import values_of

BATCH_ROWS = 16
MAX_VALUES = 4096  # in one row, with those in lists: a record can hold a few hundred at most
MAX_GROUP_VALUES = 20_000_000  # of one column in a row group: nulls take no bytes in a file, but memory


class NoImageColumn(ValueError):
    """A table without a column of images."""

    def __init__(self, where: str, columns: list[str]):
        names = layouts.listing(columns)
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
    """Records of one file, in its order. Consecutive rows with one key, image and conditions become one record.

    Args:
      prefix: what all keys begin with; None: the name of the file.

    Raises:
      NoImageColumn: if the file has no column of images.
      ValueError: if a column that the options name is missing.
    """
    if prefix is None:
        ledger.meet(".parquet")
        prefix = path.stem
    done: set[str] = set()
    waiting: tuple[Record, Described] | None = None
    try:
        with pq.ParquetFile(path) as file:
            columns = columns_of(file.schema_arrow.names, options, str(path))
            _check_metadata(path)
            ledger.bar.total = (ledger.bar.total or 0) + file.metadata.num_rows
            for number, row in _file_rows(file, columns, path.name, ledger):
                ledger.bar.update()
                name = f"{prefix}/{number:08d}"
                try:
                    if isinstance(row, Refused):
                        raise row
                    made, described = record_of_row(values_of(row, columns), name, options, path.stem)
                    if waiting is not None and waiting[0].key == made.key and _same_images(waiting[0], made):
                        waiting = _merged(*waiting, described)
                        continue
                    if made.key in done:
                        raise Refused("duplicate_key")
                    done.add(made.key)
                    if waiting is not None:
                        ledger.lose(waiting[1].lost, waiting[0].key)
                        yield waiting[0]
                    waiting = made, described
                except Refused as error:
                    ledger.refuse(error, name)
    except (pa.ArrowException, OSError) as error:
        ledger.refuse("broken_file", f"{path.name}: {str(error)[:200]}")
    if waiting is not None:
        ledger.lose(waiting[1].lost, waiting[0].key)
        yield waiting[0]


def _same_images(first: Record, second: Record) -> bool:
    return first.image == second.image and first.conditions == second.conditions


def _merged(record: Record, described: Described, more: Described) -> tuple[Record, Described]:
    both = merge(described, more)
    return dataclasses.replace(record, captions=both.captions, tags=both.tags, licence=both.licence), both


def _check_metadata(path: Path) -> None:
    """Reads all metadata in another process: damaged metadata can end a process inside pyarrow.

    Raises:
      pa.ArrowInvalid: if it ends that process.
    """
    done = subprocess.run([sys.executable, "-c", _READ_METADATA, str(path)], capture_output=True, check=False)
    if done.returncode < 0:
        raise pa.ArrowInvalid("damaged metadata")


def _file_rows(
    file: pq.ParquetFile, columns: Mapping[str, tuple[str, ...]], name: str, ledger: Ledger
) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Numbered rows of all row groups of bounded size."""
    names = sorted(set(itertools.chain.from_iterable(columns.values())))
    number = 0
    for group in range(file.num_row_groups):
        rows, values = _size(file.metadata.row_group(group), names)
        if values > MAX_GROUP_VALUES:
            ledger.refuse("broken_file", f"{name}: row group {group} holds {values} values in one column")
            number += rows
            ledger.bar.update(rows)
            continue
        for batch in file.iter_batches(BATCH_ROWS, [group], names):
            for row in _rows(batch):
                yield number, row
                number += 1


def _size(group: pq.RowGroupMetaData, columns: Collection[str]) -> tuple[int, int]:
    """The number of rows, and the largest number of values that any part of these columns announces."""
    parts = [group.column(index) for index in range(group.num_columns)]
    read = [part for part in parts if any(f"{part.path_in_schema}.".startswith(f"{name}.") for name in columns)]
    return group.num_rows, max((part.num_values for part in read), default=0)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Refused]:
    """The rows of a batch as Python objects; a row that cannot be converted costs itself alone."""
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
        except Exception:  # times out of range, unknown time zones, ..: every type has its own errors
            converted = Refused("bad_metadata")
        yield converted


def _count_values(array: pa.Array) -> int:
    """The number of Python objects that an array becomes; a list of nulls takes no bytes in a file."""
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


def columns_of(present: list[str], options: Options, where: str) -> dict[str, tuple[str, ...]]:
    """{field: columns} of a table.

    Raises:
      NoImageColumn: if no column holds images.
      ValueError: for fields that do not exist and columns that are not there.
    """
    layouts.check_columns(options.columns, present, where)
    columns = layouts.fields_of(present, options.columns, table=True)
    if "image" not in columns:
        raise NoImageColumn(where, present)
    return columns


def record_of_row(found: dict[str, Any], name: str, options: Options, source: str) -> tuple[Record, Described]:
    """A record from the fields of a row, and what they say.

    Raises:
      Refused: with a reason of `base.REASONS`.
    """
    limit = options.max_image_bytes
    images = found.pop("conditions", [])
    if len(images) > MAX_CONDITIONS:
        raise Refused("bad_metadata")
    image, conditions = _image(found.pop("image", None), limit), tuple(_image(value, limit) for value in images)
    key = found.pop("key", None)
    if key is not None:
        name = f"{name.rpartition('/')[0]}/{inner_path(str(key))}"  # unique among files
    if not is_name(name):
        raise Refused("bad_name")
    described = describe(found, options.licence)
    return make_record(name, image, conditions, described, name_of(options, source)), described


def _image(value: object, limit: int) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Refused("missing_image")
    return check_image(data, limit)
