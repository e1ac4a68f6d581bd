"""Shards: records in ArrayRecord files, and the manifest that makes a folder of them complete.

    DIR/manifest.json
    DIR/records-00000-of-00003.arrayrecord ...

The manifest is written last: a folder without one was left by an interrupted run.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipeline.records.schema import SCHEMA, SCHEMAS, Record, decode_record, encode_record
from qi2_jax.runtime import lock
from qi2_jax.runtime.atomic import write_json_atomic

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"records-\d{5}-of-\d{5}\.arrayrecord")
_MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Shard:
    """One file of records. `digest` is the SHA-256 of its payloads' hashes; scores are valid for one digest."""

    file: str
    records: int
    digest: str


def check_output(folder: Path | str, records_per_shard: int) -> None:
    """Raises the ValueErrors of `write_shards`, except for another process; call it before work that takes long."""
    if records_per_shard < 1:
        raise ValueError(f"records_per_shard is {records_per_shard}; it must be at least 1")
    if Path(folder, MANIFEST).exists():
        raise ValueError(f"{folder} already contains records; choose another folder or delete this one first")


def write_shards(folder: Path | str, records: Iterable[Record], *, records_per_shard: int) -> tuple[Shard, ...]:
    """Writes records, in their order, to a new folder of shards.

    Shards are written under temporary names and renamed together; the manifest comes last. The files of an interrupted
    run are removed first.

    Raises:
      ValueError: if `folder` already has a manifest, another process writes to it, or `records_per_shard` is below 1.
      OSError: if the disk is full; the folder is then incomplete.
    """
    folder = Path(folder)
    check_output(folder, records_per_shard)
    with lock.exclusive(folder, remove=True):
        check_output(folder, records_per_shard)
        for leftover in [*folder.glob("records-*.partial"), *folder.glob("records-*.arrayrecord")]:
            leftover.unlink()
        return _write_shards(folder, iter(records), records_per_shard)


def write_new_shards(
    folder: Path | str, records: Iterator[Record], *, records_per_shard: int, if_empty: Callable[[], str]
) -> None:
    """Writes records as `write_shards` does, but nothing, not even the folder, if there are none.

    Args:
      folder: New folder of shards.
      records: Records to write.
      records_per_shard: Number of records per file.
      if_empty: Function that returns the message of the error if there are no records.

    Raises:
      ValueError: as `write_shards`, or if there are no records.
      OSError: see `write_shards`.
    """
    first = next(records, None)
    if first is None:
        raise ValueError(if_empty())
    write_shards(folder, itertools.chain([first], records), records_per_shard=records_per_shard)


def _write_shards(folder: Path, records: Iterator[Record], records_per_shard: int) -> tuple[Shard, ...]:
    written: list[tuple[Path, int, str]] = []
    schemas = {SCHEMA}

    def noted(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            schemas.add(record.schema)
            yield record

    for first in records:
        path = folder / f"records-{len(written):05d}.partial"
        rest = itertools.islice(records, records_per_shard - 1)
        written.append((path, *_write_shard(path, noted(itertools.chain([first], rest)))))

    shards = []
    for index, (path, count, hexdigest) in enumerate(written):
        name = f"records-{index:05d}-of-{len(written):05d}.arrayrecord"
        path.rename(folder / name)
        shards.append(Shard(name, count, hexdigest))
    write_json_atomic(folder / MANIFEST, {"schema": max(schemas), "shards": [asdict(shard) for shard in shards]})
    return tuple(shards)


def _write_shard(path: Path, records: Iterable[Record]) -> tuple[int, str]:
    writer, count, digest = ArrayRecordWriter(str(path), "group_size:1"), 0, hashlib.sha256()
    try:
        for record in records:
            payload = encode_record(record)
            writer.write(payload)
            digest.update(hashlib.sha256(payload).digest())
            count += 1
        writer.close()
    except RuntimeError as error:  # the library's error for a full disk
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return count, digest.hexdigest()


def read_manifest(folder: Path | str) -> tuple[Shard, ...]:
    """Reads the shards of a folder, in order.

    Raises:
      ValueError: if the folder is incomplete, or the manifest is malformed or names a file outside the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a folder of records, or its ingestion was interrupted")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        content = json.loads(path.read_bytes())
        schema, shards = content["schema"], tuple(Shard(**shard) for shard in content["shards"])
        well_formed = all(_SHARD_NAME.fullmatch(shard.file) and shard.records > 0 for shard in shards)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest: {error!r}") from None
    if schema not in SCHEMAS:
        raise ValueError(f"{path} has schema {schema!r}; this version reads schemas {SCHEMAS}")
    if not well_formed:
        raise ValueError(f"{path} names shards that are empty or not called records-NNNNN-of-NNNNN.arrayrecord")
    return shards


def digest_of(shards: Sequence[Shard]) -> str:
    """A hash of all records in these shards and of their order."""
    return hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()


class RecordFolder:
    """Random access to the records of a folder, by position in the order of ingestion; also iterable.

    A folder can be pickled for worker processes, which open its files again. Reading a whole shard also compares its
    digest with the manifest.

    Raises:
      ValueError: as `read_manifest`, and on access if a shard is missing, corrupt, or does not match the manifest.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.shards = read_manifest(folder)
        self._ends = np.cumsum([shard.records for shard in self.shards], dtype=np.int64)
        self._readers: dict[int, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._read(shard, index - int(self._ends[shard]) + self.shards[shard].records)[1]

    def __iter__(self) -> Iterator[Record]:
        for shard in range(len(self.shards)):
            yield from self.read_shard(shard)

    def read_shard(self, shard: int) -> Iterator[Record]:
        """Yields the records of a shard; raises a ValueError at the end if they do not match the manifest."""
        digest = hashlib.sha256()
        for position in range(self.shards[shard].records):
            payload, record = self._read(shard, position)
            digest.update(hashlib.sha256(payload).digest())
            yield record
        if digest.hexdigest() != self.shards[shard].digest:
            path = self.folder / self.shards[shard].file
            raise ValueError(f"{path}: its records do not match {MANIFEST}; create {self.folder} again")

    def __reduce__(self) -> tuple[type["RecordFolder"], tuple[Path]]:
        return RecordFolder, (self.folder,)

    def _read(self, shard: int, position: int) -> tuple[bytes, Record]:
        path = self.folder / self.shards[shard].file
        try:
            if shard not in self._readers:
                reader = ArrayRecordReader(str(path))
                if reader.num_records() != self.shards[shard].records:
                    raise ValueError(f"contains {reader.num_records()} records, not {self.shards[shard].records}")
                self._readers[shard] = reader
            payload = self._readers[shard].read([position])[0]
            return payload, decode_record(payload)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}, record {position}: {error}") from None
