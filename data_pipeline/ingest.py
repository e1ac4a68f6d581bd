"""Ingestion: a folder of images with captions becomes shards of records.

Two layouts:

- Images beside captions: `a/cat.jpg` and `a/cat.txt`, at any depth. The whole text file is one general caption.
- A `metadata.jsonl` in the folder, one JSON object per line: `file_name` (path inside the folder) and either `text`
  (one general caption) or `captions` (a list of strings or of {text, kind, language}), and optionally `licence`. Other
  keys are ignored. When this file exists it alone says what belongs to the set.

Image bytes are copied as they are; whether they decode is for the filters to say. Everything that cannot become a
record is counted with its reason and never stops the run.
"""

import itertools
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data_pipeline.funnel import Step, Tally, table
from data_pipeline.records import MAX_CAPTION_CHARS, MAX_CAPTIONS, MAX_IMAGE_BYTES, MAX_NAME_CHARS, Caption, Record
from data_pipeline.shards import write_shards

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = "metadata.jsonl"
MAX_LINE_BYTES = 1 << 20

REASONS = {
    "missing_file": "metadata names a file that does not exist",
    "missing_caption": "no caption file, no caption keys, or a blank caption",
    "duplicate_key": "an earlier line of the metadata named the same file",
    "not_listed": "an image in the folder that the metadata does not name",
    "outside_folder": "the path, or the link behind it, leaves the folder",
    "linked_folder": "a link to a folder, which is not followed",
    "not_a_file": "a folder, pipe or device instead of a file",
    "unreadable": "the system refused to read the file",
    "bad_name": "a file name that is not UTF-8 or too long",
    "too_large": "the image file is above the size limit",
    "caption_too_long": f"a caption above {MAX_CAPTION_CHARS} characters, or more than {MAX_CAPTIONS} captions",
    "not_utf8": "a caption or a line of metadata that is not UTF-8",
    "bad_json": "a line of metadata that is not a JSON object or longer than a megabyte",
    "bad_metadata": "a line without file_name, with both text and captions, or with values of the wrong type",
}


@dataclass(frozen=True)
class IngestReport:
    """What became of a folder: `records` written to `folder`; `refused`: how many for which reason, with examples."""

    folder: str
    records: int
    refused: Tally

    def table(self):
        """A `rich.table.Table` of what was refused and why."""
        return table(f"ingested into {self.folder}", (Step("ingest", self.records + self.refused.total, self.refused),))

    def to_dict(self) -> dict:
        return {"folder": self.folder, "records": self.records, "refused": self.refused.to_dict()}


@dataclass(frozen=True)
class _Entry:
    key: str
    captions: tuple[Caption, ...] | None  # None: in the text file beside the image
    licence: str | None


class _Refused(Exception):
    """Carries one of REASONS."""


def ingest_folder(
    src: Path | str,
    out: Path | str,
    *,
    source: str | None = None,
    licence: str | None = None,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    records_per_shard: int = 256,
    progress: bool = True,
) -> IngestReport:
    """Writes the images and captions of folder `src`, in the order of their keys, as shards to the new folder `out`.

    Args:
      source: name of the data set in every record; default: the name of the folder.
      licence: licence of the records whose metadata gives none.
      max_image_bytes: larger image files are refused; at most `records.MAX_IMAGE_BYTES`.

    Raises:
      ValueError: when `src` is not a folder, nothing in it is usable, `out` already holds records, or the limit is too
        high. Nothing is written then.
    """
    root = Path(src).resolve()
    if not root.is_dir():
        raise ValueError(f"{src} is not a folder")
    if not 0 < max_image_bytes <= MAX_IMAGE_BYTES:
        raise ValueError(f"max_image_bytes is {max_image_bytes}; choose between 1 and {MAX_IMAGE_BYTES}")
    refused = Tally()
    listed = (root / METADATA).is_file()
    entries = _listed(root, licence, refused) if listed else _beside(root, licence, refused)

    def records() -> Iterator[Record]:
        for entry in tqdm(entries, desc="ingest", unit="img", disable=not progress):
            try:
                image = _read(root, entry.key, max_image_bytes, too_large="too_large")
                captions = _captions_beside(root, entry.key) if entry.captions is None else entry.captions
                yield Record(entry.key, image, captions, source or root.name, entry.licence)
            except _Refused as error:
                refused.add(str(error), entry.key)

    stream = records()
    first = next(stream, None)
    if first is None:
        raise ValueError(
            f"no usable image-caption pair in {root}: looked for a {METADATA}, or for images "
            f"({', '.join(IMAGE_SUFFIXES)}) with a .txt caption of the same name; "
            f"refused: {refused.counts or 'nothing'}"
        )
    shards = write_shards(out, itertools.chain([first], stream), records_per_shard=records_per_shard)
    return IngestReport(str(out), sum(shard.records for shard in shards), refused)


def _images(root: Path, refused: Tally) -> Iterator[str]:
    """Keys of all files that are called like images, in no particular order."""
    for folder, subfolders, files in os.walk(root):
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                refused.add("linked_folder", _key(root, folder, name))
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield _key(root, folder, name)


def _key(root: Path, folder: str, name: str) -> str:
    return Path(folder, name).relative_to(root).as_posix()


def _beside(root: Path, licence: str | None, refused: Tally) -> list[_Entry]:
    entries = []
    for key in sorted(_images(root, refused)):
        if _is_name(key):
            entries.append(_Entry(key, None, licence))
        else:
            refused.add("bad_name", key.encode(errors="replace").decode())
    return entries


def _listed(root: Path, licence: str | None, refused: Tally) -> list[_Entry]:
    named: set[str] = set()
    entries = []
    for number, line in _lines(root, refused):
        try:
            fields = _fields(line)
            key = _listed_key(fields)
            if key in named:
                raise _Refused("duplicate_key")
            named.add(key)
            entries.append(_Entry(key, _listed_captions(fields), _listed_licence(fields, licence)))
        except _Refused as error:
            refused.add(str(error), f"{METADATA}:{number}")
    for key in sorted(_images(root, refused)):
        if key not in named:
            refused.add("not_listed", key.encode(errors="replace").decode())
    return sorted(entries, key=lambda entry: entry.key)


def _lines(root: Path, refused: Tally) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of the metadata that are not blank, in bounded memory whatever the length of a line."""
    try:
        path = _inside(root, METADATA)
    except _Refused as error:
        raise ValueError(f"{root / METADATA} is refused: {REASONS[str(error)]}") from None
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                refused.add("bad_json", f"{METADATA}:{number}")
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                    pass
            elif line.strip():
                yield number, line


def _fields(line: bytes) -> dict:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Refused("not_utf8") from None
    except (ValueError, RecursionError):
        raise _Refused("bad_json") from None
    if not isinstance(fields, dict):
        raise _Refused("bad_json")
    return fields


def _listed_key(fields: dict) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name:
        raise _Refused("bad_metadata")
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts:
        raise _Refused("outside_folder")
    key = str(PurePosixPath(name))  # one spelling for a//b and ./a/b
    if not _is_name(key):
        raise _Refused("bad_name")
    return key


def _listed_licence(fields: dict, default: str | None) -> str | None:
    licence = fields.get("licence", default)
    if not (licence is None or (isinstance(licence, str) and _is_name(licence))):
        raise _Refused("bad_metadata")
    return licence


def _listed_captions(fields: dict) -> tuple[Caption, ...]:
    if "text" in fields and "captions" in fields:
        raise _Refused("bad_metadata")
    given = fields["captions"] if "captions" in fields else [fields["text"]] if "text" in fields else []
    if not isinstance(given, list):
        raise _Refused("bad_metadata")
    if not given:
        raise _Refused("missing_caption")
    if len(given) > MAX_CAPTIONS:
        raise _Refused("caption_too_long")
    return tuple(_caption(value) for value in given)


def _caption(value: object) -> Caption:
    fields = {"text": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise _Refused("bad_metadata")
    if not fields["text"].strip():
        raise _Refused("missing_caption")
    if len(fields["text"]) > MAX_CAPTION_CHARS:
        raise _Refused("caption_too_long")
    try:
        return Caption(**(fields | {"text": fields["text"].strip()}))
    except (ValueError, TypeError):  # an unknown kind, a malformed language, a lone surrogate, an unknown key
        raise _Refused("bad_metadata") from None


def _captions_beside(root: Path, key: str) -> tuple[Caption, ...]:
    try:
        data = _read(root, str(PurePosixPath(key).with_suffix(".txt")), 4 * MAX_CAPTION_CHARS, "caption_too_long")
    except _Refused as error:
        raise _Refused("missing_caption" if str(error) == "missing_file" else str(error)) from None
    try:
        return (_caption(data.decode("utf-8-sig")),)
    except UnicodeDecodeError:
        raise _Refused("not_utf8") from None


def _is_name(key: str) -> bool:
    """Whether a text can name a record: not blank, UTF-8, of bounded length."""
    try:
        return bool(key.strip()) and "\0" not in key and len(key.encode()) <= MAX_NAME_CHARS
    except UnicodeEncodeError:
        return False


def _inside(root: Path, key: str) -> Path:
    """The real path of a file of the folder; links are followed only as long as they stay inside."""
    try:
        path = (root / key).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _Refused("missing_file") from None
    except (OSError, RuntimeError):  # no permission, a loop of links
        raise _Refused("unreadable") from None
    if not path.is_relative_to(root):
        raise _Refused("outside_folder")
    if not stat.S_ISREG(mode):
        raise _Refused("not_a_file")
    return path


def _read(root: Path, key: str, limit: int, too_large: str) -> bytes:
    path = _inside(root, key)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)  # the limit holds even for a file that grows
    except OSError:
        raise _Refused("unreadable") from None
    if len(data) > limit:
        raise _Refused(too_large)
    return data
