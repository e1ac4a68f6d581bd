"""Folders: images beside captions, or listed by a file of JSON lines.

- Images beside captions: `a/cat.jpg` and `a/cat.txt`, at any depth; the whole text file is one general caption. Or
  `a/cat.json` with the keys of `base.describe`.
- JSON lines, as `metadata.jsonl` in the folder or as the source itself: `file_name` (path inside the folder that holds
  the file) and the keys of `base.describe`. Where there is such a file, it alone says what belongs to the set.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import MAX_CAPTION_CHARS, Record
from data_pipeline.sources import base
from data_pipeline.sources.base import IMAGE_SUFFIXES, MAX_JSON_BYTES, REASONS, Described, Options, Refused

METADATA = "metadata.jsonl"
ARCHIVE_SUFFIXES = (".tar", ".parquet")


@dataclass(frozen=True)
class _Entry:
    key: str
    described: Described | None  # None: by the file beside the image


def read_folder(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """Records of a folder, in the order of their keys."""
    root = path.resolve()
    if (root / METADATA).is_file():
        entries, named = _listed(root, METADATA, options, refused)
        for key in _images(root, refused):
            if key not in named:
                refused.add("not_listed", key.encode(errors="replace").decode())
    else:
        entries = _beside(root, refused)
    return _read_entries(root, entries, options, refused, bar)


def read_json_lines(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """Records that a file of JSON lines names, in the order of their keys."""
    root = path.resolve().parent
    return _read_entries(root, _listed(root, path.name, options, refused)[0], options, refused, bar)


def count_unread(path: Path, options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    """No record: counts what stands beside the tars or tables of a folder, or in folders below it, and is not read."""
    root = path.resolve()
    for key in sorted(_files(root, (*IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES), refused)):
        if "/" in key or not key.endswith(ARCHIVE_SUFFIXES):
            refused.add("not_read", key.encode(errors="replace").decode())
    yield from ()


def _read_entries(root: Path, entries: list[_Entry], options: Options, refused: Tally, bar: tqdm) -> Iterator[Record]:
    bar.total = (bar.total or 0) + len(entries)
    limit = options.max_image_bytes
    for entry in entries:
        try:
            image = _read(root, entry.key, limit, "too_large")
            described = _described_beside(root, entry.key, options) if entry.described is None else entry.described
            conditions = tuple(_read(root, base.inner_path(name), limit, "too_large") for name in described.conditions)
            yield base.record(entry.key, image, conditions, described, options.source or root.name)
        except Refused as error:
            refused.add(str(error), entry.key)
        bar.update()


def _images(root: Path, refused: Tally) -> Iterator[str]:
    """Keys of all files that are called like images, in order; tars and tables among them are counted as not read."""
    for key in sorted(_files(root, (*IMAGE_SUFFIXES, *ARCHIVE_SUFFIXES), refused)):
        if key.lower().endswith(IMAGE_SUFFIXES):
            yield key
        else:
            refused.add("not_read", key.encode(errors="replace").decode())


def _files(root: Path, suffixes: tuple[str, ...], refused: Tally) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                refused.add("linked_folder", _key(root, folder, name))
        for name in files:
            if name.lower().endswith(suffixes):
                yield _key(root, folder, name)


def _key(root: Path, folder: str, name: str) -> str:
    return Path(folder, name).relative_to(root).as_posix()


def _beside(root: Path, refused: Tally) -> list[_Entry]:
    entries = []
    for key in _images(root, refused):
        if base.is_name(key):
            entries.append(_Entry(key, None))
        else:
            refused.add("bad_name", key.encode(errors="replace").decode())
    return entries


def _listed(root: Path, name: str, options: Options, refused: Tally) -> tuple[list[_Entry], set[str]]:
    """What the lines of a file describe, and every file that they name, also where a line is refused."""
    named: set[str] = set()
    conditions: set[str] = set()
    entries = []
    for number, line in _lines(root, name, refused):
        try:
            fields = base.parse_json(line)
            key = base.inner_path(fields.get("file_name"))
            if key in named:
                raise Refused("duplicate_key")
            named.add(key)
            described = base.describe(fields, options.licence)
            conditions.update(str(PurePosixPath(condition)) for condition in described.conditions)
            entries.append(_Entry(key, described))
        except Refused as error:
            refused.add(str(error), f"{name}:{number}")
    return sorted(entries, key=lambda entry: entry.key), named | conditions


def _lines(root: Path, name: str, refused: Tally) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, in bounded memory whatever the length of a line."""
    try:
        path = _inside(root, name)
    except Refused as error:
        raise ValueError(f"{root / name} is refused: {REASONS[str(error)]}") from None
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_JSON_BYTES + 1):
            number += 1
            if len(line) > MAX_JSON_BYTES:
                refused.add("bad_json", f"{name}:{number}")
                while not line.endswith(b"\n") and (line := file.readline(MAX_JSON_BYTES)):
                    pass
            elif line.strip():
                yield number, line


def _described_beside(root: Path, key: str, options: Options) -> Described:
    for suffix, limit in ((".json", MAX_JSON_BYTES), (".txt", 4 * MAX_CAPTION_CHARS)):
        try:
            name = str(PurePosixPath(key).with_suffix(suffix))
            data = _read(root, name, limit, "bad_json" if suffix == ".json" else "caption_too_long")
        except Refused as error:
            if str(error) == "missing_file":
                continue
            raise
        if suffix == ".json":
            return base.describe(base.parse_json(data), options.licence)
        return base.describe({}, options.licence, texts=(base.caption_of_file(data),))
    raise Refused("missing_caption")


def _inside(root: Path, key: str) -> Path:
    """The real path of a file of the folder; links are followed only as long as they stay inside."""
    try:
        path = (root / key).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise Refused("missing_file") from None
    except (OSError, RuntimeError):  # no permission, a loop of links
        raise Refused("unreadable") from None
    if not path.is_relative_to(root):
        raise Refused("outside_folder")
    if not stat.S_ISREG(mode):
        raise Refused("not_a_file")
    return path


def _read(root: Path, key: str, limit: int, too_large: str) -> bytes:
    path = _inside(root, key)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)  # the limit holds even for a file that grows
    except OSError:
        raise Refused("unreadable") from None
    if len(data) > limit:
        raise Refused(too_large)
    return data
