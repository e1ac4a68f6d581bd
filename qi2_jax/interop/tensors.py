"""safetensors files as byte ranges, which are found without reading tensors and copied without loading them.

The `safetensors` library validates files. It can only write tensors that are all in memory, so the writer here streams
them.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qi2_jax.interop import published_files
from qi2_jax.interop.files import read_json
from qi2_jax.runtime.dtypes import DTYPES

# Dtypes of weights. Integers and 8-bit floats would be quantised weights, which are useless without their scales.
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
COPY_CHUNK = 16 << 20


def size(code: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in bytes."""
    return math.prod(shape) * DTYPES[code].itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, with the bytes `file[start : start + nbytes]`."""

    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return size(self.code, self.shape)

    def part(self, layer: int | None) -> "Stored":
        """One layer of a stacked tensor; None: the whole tensor."""
        if layer is None:
            return self
        rest = dataclasses.replace(self, shape=self.shape[1:])
        return dataclasses.replace(rest, start=self.start + layer * rest.nbytes)

    def open(self) -> np.ndarray:
        """The tensor as a read-only memory map."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)


def scan(path: pathlib.Path, dtypes: tuple[str, ...] = WEIGHT_DTYPES) -> dict[str, Stored]:
    """Tensors of one safetensors file.

    Args:
      path: file to read.
      dtypes: codes of the dtypes that its tensors may have.

    Raises:
      ValueError: if the file is not a complete safetensors file, or contains tensors of other dtypes.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header, its offsets and the length of the file
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    header.pop("__metadata__", None)
    if other := {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in dtypes}:
        raise ValueError(f"{path} contains tensors of other dtypes than {dtypes}: {other}")
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def scan_folder(folder: pathlib.Path, stem: str, variant: str | None = None) -> dict[str, Stored]:
    """Tensors of a component, from its single file or from the shards that its index names.

    Args:
      folder, stem, variant: see `published_files.weights_file`.

    Raises:
      ValueError: as `weights_file`; if a shard is missing or outside the folder; or if index and shards disagree.
    """
    index = published_files.weights_file(folder, stem, variant)
    if index.suffix == ".safetensors":
        return scan(index)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    shards = sorted(set(places.values()))
    outside = [file for file in shards if pathlib.PurePath(file).name != file]
    absent = [file for file in shards if file not in outside and not (folder / file).is_file()]
    if outside or absent:
        raise ValueError(f"{index} names shards outside its folder {outside}, and shards that are missing {absent}")
    found: dict[str, Stored] = {}
    wrong = []
    for file in shards:
        for tensor, stored in scan(folder / file).items():
            if places.get(tensor) != file:
                wrong.append(f"{tensor} is in {file}, the index says {places.get(tensor)}")
            found[tensor] = stored
    wrong += [f"{tensor} is in no shard, the index says {places[tensor]}" for tensor in places.keys() - found.keys()]
    if wrong:
        raise ValueError(f"{index} and its shards disagree:\n  " + "\n  ".join(sorted(wrong)))
    return found


class Writer:
    """Writes a safetensors file piece by piece; the file appears under its name when it is complete.

    Args:
      path: file to create.
      specs: {name: (dtype code, shape)} in the order of the file.
      bar: progress bar, advanced by the number of bytes written.
      metadata: further entries of the header's metadata.
    """

    def __init__(
        self,
        path: pathlib.Path,
        specs: Mapping[str, tuple[str, tuple[int, ...]]],
        bar: Any = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.path, self._temporary = path, path.with_name(path.name + ".partial")
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name, (code, shape) in specs.items():
            end = offset + size(code, shape)
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            self._places[name] = (offset, end - offset)
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
        self._base, self._total, self._written, self._bar = 8 + len(text), offset, 0, bar
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.flush()

    def __enter__(self) -> "Writer":
        return self

    def write(self, name: str, part: np.ndarray | Stored, offset: int = 0) -> int:
        """Writes bytes of tensor `name` from `offset` on, and returns how many.

        `part` is an array, or a tensor in another file, which the operating system copies.
        """
        place, room = self._places[name]
        if offset + part.nbytes > room:
            raise ValueError(f"{self.path}: {part.nbytes} bytes at {offset} do not fit in {name} of {room} bytes")
        position = self._base + place + offset
        if isinstance(part, Stored):
            _copy(part, self._file.fileno(), position)
        else:
            self._file.seek(position)
            self._file.write(np.ascontiguousarray(part).view(np.uint8).reshape(-1).data)
        self._written += part.nbytes
        if self._bar is not None:
            self._bar.update(part.nbytes)
        return part.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        if isinstance(error, OSError):
            _name(error, self.path)
        try:
            if kind is None:
                if self._written != self._total:
                    raise ValueError(f"{self.path}: {self._written} of {self._total} bytes were written")
                self._file.flush()
                os.fsync(self._file.fileno())
                complete = True
        except OSError as late:
            _name(late, self.path)
            raise
        finally:
            self._file.close()
            if complete:
                os.replace(self._temporary, self.path)
            else:
                self._temporary.unlink(missing_ok=True)


def _name(error: OSError, path: pathlib.Path) -> None:
    """Adds the path to an error without one: calls on a file handle report a full disk without a name."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


def _copy(part: Stored, target: int, position: int) -> None:
    source = os.open(part.file, os.O_RDONLY)
    try:
        start, left = part.start, part.nbytes
        while left:
            try:
                done = os.copy_file_range(source, target, min(left, COPY_CHUNK), start, position)
            except OSError:  # some file systems refuse the kernel's copy
                done = os.pwrite(target, os.pread(source, min(left, COPY_CHUNK), start), position)
            if not done:
                raise ValueError(f"{part.file} ended early: {left} bytes of a tensor are missing")
            start, position, left = start + done, position + done, left - done
    finally:
        os.close(source)
