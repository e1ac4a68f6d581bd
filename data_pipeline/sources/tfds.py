"""TensorFlow Datasets: data sets that are prepared on this disk as ArrayRecord, read without TensorFlow.

The source is `tfds:NAME[/CONFIG][:VERSION]`, with `Options.split` and `Options.data_dir`. Nothing is downloaded and no
code of the data set runs; its files describe their content. Features are columns, as in Parquet (`sources.parquet`);
nested features have names with slashes (`objects/label`). An image is read as its stored bytes, a class as its name,
and a sequence as a list of these. This reader needs `pip install qi2[tfds]`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.records.schema import MAX_CONDITIONS, Record
from data_pipeline.sources.base import Ledger, Options, Refused
from data_pipeline.sources.fields import MAX_JSON_BYTES
from data_pipeline.sources.layouts import read_values
from data_pipeline.sources.parquet import map_columns, row_to_record

SCHEME = "tfds:"
Value = TypeVar("Value")


def read_tfds(path: Path, options: Options, ledger: Ledger) -> Iterator[Record]:
    """Records of one split, in order; keys are NAME/CONFIG/VERSION/SPLIT/NUMBER.

    Args:
      path: source without `tfds:`.
      options: options of reading.
      ledger: counts of the source.

    Raises:
      ValueError: if tensorflow-datasets is not installed, the data set, split or column does not exist, or its files
        are not ArrayRecord.
    """
    builder = _open(str(path), options.data_dir)
    readers = {name: _reader(feature) for name, feature in _flatten(builder.info.features)}
    columns = map_columns([name for name, reader in readers.items() if reader is not None], options, f"{SCHEME}{path}")
    parse = _parser(columns, readers)
    name = f"{builder.info.full_name}/{options.split}"
    raw = _split(builder, options.split)
    ledger.bar.total = (ledger.bar.total or 0) + len(raw)
    limit = (1 + MAX_CONDITIONS) * options.max_image_bytes + MAX_JSON_BYTES
    for number in range(len(raw)):
        ledger.bar.update()
        key = f"{name}/{number:08d}"
        try:
            data = raw[number]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            ledger.refuse("broken_file", f"{key}: {str(error)[:200]}")
            return
        try:
            if len(data) > limit:
                raise Refused("too_large")
            record, described = row_to_record(parse(data), key, options, builder.info.name)
            ledger.count_lost(described.lost, key)
            yield record
        except Refused as error:
            ledger.refuse(error, key)


def _open(name: str, data_dir: Path | None) -> Any:
    try:
        from tensorflow_datasets.core import read_only_builder
    except ImportError:
        raise ValueError(f"{SCHEME}{name} needs tensorflow-datasets: pip install tensorflow-datasets") from None
    where = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        builder = read_only_builder.builder_from_files(name, **where)
        if builder.info.features is None:
            raise ValueError("it does not describe its features")
        return builder
    except Exception as error:  # absent and damaged descriptions raise errors of any type
        place = data_dir or "the default folder of tensorflow-datasets; name it with --data-dir"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"no prepared data set {name!r} in {place}: {reason}") from None


def _split(builder: Any, split: str) -> Any:
    """Random access to the stored examples of a split, as bytes."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        return builder.as_data_source(split=split, deserialize_method=DeserializeMethod.RAW_BYTES)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{builder.info.full_name} has the splits {sorted(builder.info.splits)}; {split!r} cannot be read from "
            f"files of the format {builder.info.file_format}: {str(error)[:300]}. Only ArrayRecord is read: prepare "
            "the data set with file_format='array_record'"
        ) from None


def _flatten(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from tensorflow_datasets.core import features as kinds

    for name, feature in features.items():
        if isinstance(feature, kinds.FeaturesDict):
            yield from _flatten(feature, f"{prefix}{name}/")
        elif isinstance(feature, kinds.Sequence) and isinstance(feature.feature, kinds.FeaturesDict):
            # A sequence of dicts is stored as a dict of sequences.
            yield from ((key, _Repeated(one)) for key, one in _flatten(feature.feature, f"{prefix}{name}/"))
        else:
            yield prefix + name, feature


class _Repeated:
    """A feature inside a sequence of dicts."""

    def __init__(self, feature: Any):
        self.feature = feature


def _reader(feature: Any) -> Callable[[Any], Any] | None:
    """Returns a function that decodes a stored feature; None for features other than images, text and classes."""
    from tensorflow_datasets.core import features as kinds

    if isinstance(feature, kinds.Image):
        return lambda stored: _single(stored.bytes_list.value)
    if isinstance(feature, kinds.Text):
        return lambda stored: _text(_single(stored.bytes_list.value))
    if isinstance(feature, kinds.ClassLabel):
        return lambda stored: _class_name(feature, _single(stored.int64_list.value))
    inner = feature.feature if isinstance(feature, kinds.Sequence | _Repeated) else None
    if isinstance(inner, kinds.Image):
        return lambda stored: list(stored.bytes_list.value)
    if isinstance(inner, kinds.Text):
        return lambda stored: [_text(value) for value in stored.bytes_list.value]
    if isinstance(inner, kinds.ClassLabel):
        return lambda stored: list(dict.fromkeys(_class_name(inner, value) for value in stored.int64_list.value))
    return None


def _parser(
    columns: dict[str, tuple[str, ...]], readers: dict[str, Callable[[Any], Any] | None]
) -> Callable[[bytes], dict[str, Any]]:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    def parse(data: bytes) -> dict[str, Any]:
        """Decodes a stored example to {field: value}."""
        try:
            stored = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError:
            raise Refused("bad_metadata") from None
        row = {}
        for column in itertools.chain.from_iterable(columns.values()):
            reader = readers[column]
            if reader is not None and column in stored:
                row[column] = reader(stored[column])
        return read_values({column: value for column, value in row.items() if value != []}, columns)

    return parse


def _single(values: Sequence[Value]) -> Value | None:
    if len(values) > 1:
        raise Refused("bad_metadata")
    return values[0] if values else None


def _text(value: bytes | None) -> str | None:
    try:
        return value.decode() if value else None  # an empty text means None
    except UnicodeDecodeError:
        raise Refused("not_utf8") from None


def _class_name(feature: Any, value: int | None) -> str | None:
    if value is None or value == -1:  # "no label", as in test splits
        return None
    if not 0 <= value < feature.num_classes:
        raise Refused("bad_metadata")
    return feature.int2str(value)
