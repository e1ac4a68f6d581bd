"""Metadata files: JSON lines, a JSON list or a CSV table in which every row names and describes an image.

File names are relative to the folder of the metadata file. Several rows with one image become one record with all of
their captions; rows with other condition images become separate records.
"""

import contextlib
import os
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.sources import layouts
from data_pipeline.sources.base import REASONS, Ledger, Options, Refused, inner_path
from data_pipeline.sources.fields import Description, describe, merge
from data_pipeline.sources.rows import read_rows
from data_pipeline.sources.tree import Files

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
    for where, row in read_rows(path, name, ledger):
        try:
            if isinstance(row, Refused):
                raise row
            listing.keys |= dict.fromkeys(list(row)[:1000])
            image, described = _entry(row, files.root, place, options, listing, ledger)
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


def count_named(files: Files, name: str, options: Options, images: Collection[str]) -> tuple[int, int]:
    """How many rows of a table that is not read name one of these images, and how many rows there are.

    Args:
      files: files of the folder.
      name: path of the table, relative to the root.
      options: options of reading.
      images: paths of images, relative to the root.
    """
    try:
        path = files.path(name)
    except Refused:
        return 0, 0
    named = rows = 0
    for _, row in read_rows(path, name, Ledger(tqdm(disable=True))):  # the source has counted the file
        rows += 1
        with contextlib.suppress(Refused):
            filled = {} if isinstance(row, Refused) else layouts.without_blanks(row)
            for key in layouts.map_fields(filled, options.columns, table=False).get("image", ()):
                named += _resolve_name(filled.get(key), files.root, name.rpartition("/")[0]) in images
    return named, rows


def _entry(
    row: dict[str, Any], root: Path, place: str, options: Options, listing: Listing, ledger: Ledger
) -> tuple[str, Description]:
    filled = layouts.without_blanks(row)
    fields = layouts.map_fields(filled, options.columns, table=False)
    if "image" not in fields:
        raise Refused("unknown_keys", f"keys {layouts.format_keys(row)}")
    listing.names_images = True
    values = layouts.read_values(filled, fields)
    ledger.count_unused(layouts.unused_keys(filled, fields))
    image = _resolve_name(values["image"], root, place)
    listing.named.add(image)
    try:
        described = describe(values, options)
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
    inner = inner_path(_on_disk(name, root / place) if isinstance(name, str) else name)
    return f"{place}/{inner}" if place else inner


def _on_disk(name: str, folder: Path) -> str:
    r"""The spelling under which a file exists: macOS decomposes `é`, and Windows writes `\` between folders."""
    if name.isascii() and "\\" not in name:
        return name
    spellings = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    spellings += [spelling.replace("\\", "/") for spelling in (name, *spellings)]
    try:
        return next((one for one in (name, *spellings) if os.path.lexists(folder / inner_path(one))), name)
    except (OSError, ValueError, Refused):
        return name
