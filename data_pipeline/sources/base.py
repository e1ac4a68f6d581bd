"""What all sources share: reasons for a refusal, and what metadata may say of a sample."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from data_pipeline.funnel import Tally
from data_pipeline.records.schema import (
    INSTRUCTION,
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    MAX_CONDITIONS,
    MAX_IMAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_TAG_CHARS,
    MAX_TAGS,
    Caption,
    Record,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
MAX_JSON_BYTES = 1 << 20  # of the metadata of one sample

REASONS = {
    "missing_file": "metadata names a file that does not exist",
    "missing_image": "a sample without an image",
    "missing_caption": "no caption file, no caption keys, or a blank caption",
    "missing_instruction": "condition images without an instruction",
    "missing_condition": "an instruction without condition images, or a gap in their numbers",
    "duplicate_key": "an earlier sample has the same name",
    "not_listed": "an image in the folder that the metadata does not name",
    "not_read": "an image beside tars or tables, or one of those beside images or in a folder below",
    "outside_folder": "the path, or the link behind it, leaves the folder",
    "linked_folder": "a link to a folder, which is not followed",
    "not_a_file": "a folder, link, pipe or device instead of a file",
    "unreadable": "the system refused to read the file",
    "broken_file": "an archive or table that cannot be read on; what came before it is kept",
    "bad_name": "a name that is blank, not UTF-8 or too long",
    "too_large": "an image file above the size limit",
    "caption_too_long": f"a caption above {MAX_CAPTION_CHARS} characters, or more than {MAX_CAPTIONS} captions",
    "not_utf8": "a caption or metadata that is not UTF-8",
    "bad_json": "metadata that is not a JSON object or longer than a megabyte",
    "bad_metadata": "metadata with keys that contradict each other, or with values of the wrong type",
}


class Refused(Exception):
    """A sample cannot become a record; carries one of REASONS."""


@dataclass(frozen=True)
class Options:
    """How a source is read.

    Attributes:
      source: name of the data set in every record; None: after the file or folder.
      licence: of the samples whose metadata gives none.
      max_image_bytes: larger image files are refused.
      columns: of a table, which column holds which field (`image`, `text`, ...).
      split, data_dir: of a data set of tensorflow-datasets, which part of it, and the folder of all data sets.
    """

    source: str | None = None
    licence: str | None = None
    max_image_bytes: int = MAX_IMAGE_BYTES
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    data_dir: Path | None = None


DEFAULTS = Options()

# (path, options, refusals to count, progress bar to advance by a sample each) -> records
Reader = Callable[[Path, Options, Tally, tqdm], Iterator[Record]]


@dataclass(frozen=True)
class Described:
    """What metadata says of one sample; `conditions` are names of files."""

    captions: tuple[Caption, ...]
    conditions: tuple[str, ...]
    tags: tuple[str, ...]
    licence: str | None


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      Refused: for anything else, or more than a megabyte of it.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Refused("bad_json")
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Refused("not_utf8") from None
    except (ValueError, RecursionError):
        raise Refused("bad_json") from None
    if not isinstance(fields, dict):
        raise Refused("bad_json")
    return fields


def describe(fields: dict[str, Any], licence: str | None, *, texts: tuple[Caption, ...] = ()) -> Described:
    """Reads the keys that we know; others are ignored.

    Args:
      fields: either `text` (one general caption) or `captions` (a list of strings or of {text, kind, language}); for an
        edit `instruction` (a string, or a list like that of captions) and `conditions` (a list of file names), where
        captions may be missing; `tags` (a list of strings); `licence`.
      licence: where the fields give none.
      texts: captions found elsewhere, such as in a text file.

    Raises:
      Refused: for values of the wrong type or above their limits.
    """
    if "text" in fields and "captions" in fields:
        raise Refused("bad_metadata")
    given = fields["captions"] if "captions" in fields else [fields["text"]] if "text" in fields else []
    instruction = fields.get("instruction", [])
    instructions = [instruction] if isinstance(instruction, str) else instruction
    conditions, tags = fields.get("conditions", []), fields.get("tags", [])
    lists = (given, instructions, conditions, tags)
    if not all(isinstance(values, list) for values in lists):
        raise Refused("bad_metadata")
    if len(given) + len(instructions) + len(texts) > MAX_CAPTIONS:
        raise Refused("caption_too_long")
    captions = tuple(caption(value, INSTRUCTION) for value in instructions) + texts
    captions += tuple(caption(value) for value in given)
    if not captions:
        raise Refused("missing_caption")
    if len(conditions) > MAX_CONDITIONS or not all(isinstance(name, str) for name in conditions):
        raise Refused("bad_metadata")
    if len(tags) > MAX_TAGS or not all(is_name(tag) and len(tag) <= MAX_TAG_CHARS for tag in tags):
        raise Refused("bad_metadata")
    found = fields.get("licence", licence)
    if not (found is None or is_name(found)):
        raise Refused("bad_metadata")
    return Described(captions, tuple(conditions), tuple(tags), found)


def caption(value: object, kind: str | None = None) -> Caption:
    """A caption from a string or from {text, kind, language}; `kind`: what it must be."""
    fields = {"text": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise Refused("bad_metadata")
    if not fields["text"].strip():
        raise Refused("missing_caption")
    if len(fields["text"]) > MAX_CAPTION_CHARS:
        raise Refused("caption_too_long")
    fields = {
        name: found for name, found in fields.items() if found is not None
    }  # tables hold nulls for what is absent
    if kind is not None:
        fields = {"kind": kind} | fields
    try:
        found = Caption(**(fields | {"text": fields["text"].strip()}))
    except (ValueError, TypeError):  # an unknown kind, a malformed language, a lone surrogate, an unknown key
        raise Refused("bad_metadata") from None
    if (found.kind == INSTRUCTION) != (kind == INSTRUCTION):
        raise Refused("bad_metadata")
    return found


def caption_of_file(data: bytes, kind: str | None = None) -> Caption:
    """A caption that is a whole text file."""
    try:
        return caption(data.decode("utf-8-sig"), kind)
    except UnicodeDecodeError:
        raise Refused("not_utf8") from None


def record(key: str, image: bytes, conditions: tuple[bytes, ...], described: Described, source: str) -> Record:
    """A record of parts whose limits have been checked."""
    has_instruction = any(found.kind == INSTRUCTION for found in described.captions)
    if conditions and not has_instruction:
        raise Refused("missing_instruction")
    if has_instruction and not conditions:
        raise Refused("missing_condition")
    return Record(key, image, described.captions, source, described.licence, conditions, described.tags)


def is_name(name: object) -> bool:
    """Whether a value can name something: text that is not blank, UTF-8, of bounded length."""
    try:
        return (
            isinstance(name, str) and bool(name.strip()) and "\0" not in name and len(name.encode()) <= MAX_NAME_CHARS
        )
    except UnicodeEncodeError:
        return False


def inner_path(name: object) -> str:
    """A path inside a folder or archive, in one spelling for `a//b` and `./a/b`.

    Raises:
      Refused: if it leaves the folder, or is no name.
    """
    if not isinstance(name, str) or not name:
        raise Refused("bad_metadata")
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise Refused("outside_folder")
    key = str(PurePosixPath(name))
    if not is_name(key):
        raise Refused("bad_name")
    return key
