"""Metadata files: JSON lines, a JSON list or a CSV table in which every row names and describes an image.

File names are relative to the folder of the metadata file. Several rows with one image become one record with all of
their captions; rows with other condition images become separate records.
"""

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources import layouts
from data_pipeline.sources.base import REASONS, Ledger, Options, Refused, inner_path
from data_pipeline.sources.fields import MAX_JSON_BYTES, Description, describe, merge, parse_json
from data_pipeline.sources.tree import Files
from qi2_jax.runtime.text_files import read_text

MAX_LIST_BYTES = 256 << 20  # a JSON list, which is read as a whole
SUFFIXES = (".jsonl", ".csv", ".json")


@dataclass(frozen=True)
class Entry:
    """An image that a metadata file describes.

    Attributes:
      key: key of the record.
      image: image file, relative to the root; conditions in `described` are relative to it, too.
    """

    key: str
    image: str
    described: Description


@dataclass
class Listing:
    """Content of a metadata file.

    Attributes:
      named: all files that it names, also in refused rows.
      keys: all keys or columns in it.
      names_images: whether any row has a key for an image.
    """

    entries: list[Entry]
    named: set[str]
    keys: dict[str, None]
    names_images: bool


def read_metadata(files: Files, name: str, options: Options, ledger: Ledger) -> Listing:
    """Reads a metadata file of a folder.

    Args:
      files: files of the folder.
      name: path of the metadata file, relative to the root.
      options: options of reading.
      ledger: counts of the source.

    Raises:
      ValueError: if the file is outside the folder or cannot be read, or lacks a column that the options name.
    """
    try:
        path = files.path(name)
    except Refused as error:
        raise ValueError(f"{files.root / name} is refused: {REASONS[error.reason]}") from None
    place = name.rpartition("/")[0]
    listing = Listing([], set(), {}, False)
    grouped: dict[tuple[str, tuple[str, ...]], Description] = {}
    unknown: list[tuple[str, Refused]] = []
    for where, row in _rows(path, name, ledger):
        try:
            if isinstance(row, Refused):
                raise row
            listing.keys |= dict.fromkeys(list(row)[:1000])
            image, described = _entry(row, files.root, place, options, listing)
            group = image, described.conditions
            grouped[group] = merge(grouped[group], described) if group in grouped else described
        except Refused as error:
            if error.reason == "unknown_keys":
                unknown.append((where, error))
            else:
                ledger.refuse(error, where)
    if listing.keys:
        layouts.check_columns(options.columns, listing.keys, str(files.root / name))
    for where, refusal in unknown if listing.names_images else unknown[:1]:
        ledger.refuse(refusal, where)
    taken: dict[str, int] = {}
    for (image, _), described in grouped.items():
        taken[image] = number = taken.get(image, 0) + 1
        listing.entries.append(Entry(image if number == 1 else f"{image}#{number}", image, described))
        listing.named.update(described.conditions)
    return listing


def _entry(row: dict[str, Any], root: Path, place: str, options: Options, listing: Listing) -> tuple[str, Description]:
    present = [key for key, value in row.items() if value is not None and value != ""]
    fields = layouts.map_fields(present, options.columns, table=False)
    if "image" not in fields:
        raise Refused("unknown_keys", f"keys {layouts.format_keys(row)}")
    listing.names_images = True
    values = layouts.read_values(row, fields)
    image = _resolve_name(values["image"], root, place)
    listing.named.add(image)
    try:
        described = describe(values, options.licence)
    except Refused as error:
        raise Refused(error.reason, f"keys {layouts.format_keys(row)}" * (error.reason == "missing_caption")) from None
    conditions = tuple(_resolve_name(name, root, place) for name in described.conditions)
    return image, Description(described.captions, conditions, described.tags, described.licence, described.lost)


def _resolve_name(name: Any, root: Path, place: str) -> str:
    """The path, relative to the root, of a file that metadata names; some trainers write absolute paths."""
    if isinstance(name, str) and name.startswith("/"):
        with contextlib.suppress(ValueError):  # a path outside the root, or an invalid one
            path = Path(name)
            return inner_path(str((path.parent.resolve() / path.name).relative_to(root)))
    inner = inner_path(name)
    return f"{place}/{inner}" if place else inner


def _rows(path: Path, name: str, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    """Yields the rows of a file, each with its place for messages."""
    try:
        if name.lower().endswith(".csv"):
            yield from _csv_rows(path, name)
        elif name.lower().endswith(".json"):
            yield from _json_rows(path, name)
        else:
            yield from _json_lines(path, name)
    except OSError:
        ledger.refuse("unreadable", name)
    except csv.Error as error:
        ledger.refuse(Refused("broken_file", str(error)), name)


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    """Yields lines that are not blank, in bounded memory for lines of any length."""
    encoding = _encoding(path)
    in_bytes = encoding == "utf-8"  # a malformed line then does not affect the others
    opened: Any = open(path, "rb") if in_bytes else open(path, encoding=encoding, errors="replace", newline="\n")  # noqa: SIM115
    with opened as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            data = line if isinstance(line, bytes) else line.encode()
            if len(data) > MAX_JSON_BYTES:
                yield f"{name}:{number}", Refused("bad_json")
                while not data.endswith(b"\n") and (data := file.readline(MAX_JSON_BYTES)):
                    data = data if isinstance(data, bytes) else data.encode()
            elif data.strip():
                yield f"{name}:{number}", _try_parse(data)


def _try_parse(data: bytes) -> dict[str, Any] | Refused:
    try:
        return parse_json(data)
    except Refused as error:
        return error


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    try:
        rows = json.loads(read_text(path, MAX_LIST_BYTES))
    except (ValueError, RecursionError):
        yield name, Refused("bad_json")
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{name}:{number}", row if isinstance(row, dict) else Refused("bad_json")


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    encoding = _encoding(path)
    with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors="replace", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="", strict=True)
        for row in reader:
            if "\ufffd" in "".join(str(value) for value in row.values()):
                yield f"{name}:{reader.line_num}", Refused("not_utf8")
            else:
                yield f"{name}:{reader.line_num}", {key: value for key, value in row.items() if key}


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
