"""From the metadata of one sample to the captions, tags and licence of its record.

An optional part that cannot be used costs itself alone: the record is made without it, and the part is counted. A
sample is refused only if no caption is left.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.records.schema import (
    INSTRUCTION,
    KINDS,
    MAX_CAPTION_CHARS,
    MAX_CAPTIONS,
    MAX_CONDITIONS,
    MAX_TAG_CHARS,
    MAX_TAGS,
    Caption,
    Record,
    is_language,
)
from data_pipeline.sources.base import Options, Refused, is_name
from qi2_jax.runtime.text_files import read_text

MAX_JSON_BYTES = 1 << 20  # of the metadata of one sample


@dataclass(frozen=True)
class Described:
    """What metadata says about one sample.

    Attributes:
      conditions: file names of the condition images.
      lost: reasons of `base.LOST` for the parts that could not be used.
    """

    captions: tuple[Caption, ...]
    conditions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    licence: str | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A caption from a text file, or why the file cannot be used.

    Attributes:
      kind: INSTRUCTION, or None for a caption.
    """

    content: str | Refused
    kind: str | None = None


def parse_json(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      Refused: for anything else, or more than a megabyte of it.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Refused("bad_json")
    try:
        fields = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        raise Refused("bad_json") from None
    if not isinstance(fields, dict):
        raise Refused("bad_json")
    return fields


def decode_text(data: bytes) -> str:
    """The text of a file, in the encoding of its byte-order mark.

    Raises:
      Refused: if the bytes are no text.
    """
    try:
        return read_text(data)
    except ValueError:
        raise Refused("not_utf8") from None


def text_of_file(content: bytes | Refused, kind: str | None = None) -> Text:
    """The caption that a text file is as a whole."""
    try:
        return Text(content if isinstance(content, Refused) else decode_text(content), kind)
    except Refused as refusal:
        return Text(refusal, kind)


def describe(fields: dict[str, Any], licence: str | None, texts: Sequence[Text] = ()) -> Described:
    """Reads the fields that we know; others are ignored.

    Args:
      fields: values by our names, see `layouts`: either `text` (one general caption) or `captions` (a list of strings
        or of {text, kind, language}); for an edit `instruction` (a string, or a list like that of captions) and
        `conditions` (a list of file names), where captions may be missing; `tags` (a list, or a string with commas);
        `licence`.
      licence: the licence if the fields give none.
      texts: captions from text files.

    Raises:
      Refused: if there is no usable caption, or the fields contradict each other.
    """
    if "text" in fields and "captions" in fields:
        raise Refused("bad_metadata")
    instructions, general = _listed(fields, "instruction"), _listed(fields, "captions") + _listed(fields, "text")
    conditions = _listed(fields, "conditions")
    if len(conditions) > MAX_CONDITIONS or not all(isinstance(name, str) for name in conditions):
        raise Refused("bad_metadata")
    parts: list[tuple[Any, str | None]] = [(value, INSTRUCTION) for value in instructions]
    parts += [(text.content, text.kind) for text in texts] + [(value, None) for value in general]
    captions, lost = _captions(parts)
    tags, lost_tags = _tags(fields.get("tags"))
    found = fields.get("licence")
    if found is None or (isinstance(found, str) and not found.strip()):
        found = licence
    elif not is_name(found):
        found, lost_tags = None, [*lost_tags, "bad_licence"]
    return Described(captions, tuple(conditions), tags, found, (*lost, *lost_tags))


def _listed(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _captions(parts: Sequence[tuple[Any, str | None]]) -> tuple[tuple[Caption, ...], list[str]]:
    captions: dict[Caption, None] = {}  # in order, without repetitions
    lost: list[str] = []
    for value, kind in parts:
        try:
            if isinstance(value, Refused):
                raise value
            made, lost_parts = _caption(value, kind)
            captions[made] = None
            lost += lost_parts
        except Refused as refusal:
            lost.append(refusal.reason)
    if not captions:
        raise Refused(lost[0] if lost else "missing_caption")
    if len(captions) > MAX_CAPTIONS:
        lost.append("too_many_captions")
    return tuple(captions)[:MAX_CAPTIONS], lost


def _caption(value: object, kind: str | None) -> tuple[Caption, list[str]]:
    """A caption from a string or from {text, kind, language}, and reasons of LOST for its parts.

    Args:
      kind: INSTRUCTION if the caption must be an instruction; None if it must not be one.
    """
    fields = {"text": value} if isinstance(value, str) else value
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or not isinstance(text, str):
        raise Refused("bad_metadata")
    if not text.strip():
        raise Refused("missing_caption")
    if len(text) > MAX_CAPTION_CHARS:
        raise Refused("caption_too_long")
    if "\0" in text:
        raise Refused("not_utf8")
    lost: list[str] = []
    language, found = fields.get("language"), fields.get("kind")
    if language is not None:
        # Programs write `zh_CN` and `en_US.UTF-8`, as locales are called.
        language = language.split(".")[0].replace("_", "-") if isinstance(language, str) else language
        if not is_language(language):
            language, lost = None, ["bad_language"]
    if found is not None and found not in KINDS:
        found, lost = None, [*lost, "unknown_kind"]
    found = found or kind or "general"
    if (found == INSTRUCTION) != (kind == INSTRUCTION):
        raise Refused("bad_metadata")
    try:
        return Caption(text.strip(), found, language), lost
    except ValueError:  # a lone surrogate
        raise Refused("bad_metadata") from None


def _tags(value: Any) -> tuple[tuple[str, ...], list[str]]:
    """The first usable tags of a list, or of a string with commas, and the reasons of LOST for the others."""
    if value is None:
        return (), []
    values = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    usable: dict[str, None] = {}
    lost = []
    for tag in values:
        tag = tag.strip() if isinstance(tag, str) else tag
        if is_name(tag) and len(tag) <= MAX_TAG_CHARS:
            usable[tag] = None
        else:
            lost.append("bad_tag")
    if len(usable) > MAX_TAGS:
        lost.append("too_many_tags")
    return tuple(usable)[:MAX_TAGS], lost


def make_record(key: str, image: bytes, conditions: tuple[bytes, ...], described: Described, source: str) -> Record:
    """A record of parts whose limits have been checked.

    Raises:
      Refused: for condition images without an instruction, or an instruction without condition images.
    """
    has_instruction = any(caption.kind == INSTRUCTION for caption in described.captions)
    if conditions and not has_instruction:
        raise Refused("missing_instruction")
    if has_instruction and not conditions:
        raise Refused("missing_condition")
    return Record(key, image, described.captions, source, described.licence, conditions, described.tags)


def merge(first: Described, second: Described) -> Described:
    """Two descriptions of one image, or of one edit, as one.

    Raises:
      Refused: if the second adds nothing.
    """
    captions = tuple(dict.fromkeys((*first.captions, *second.captions)))
    tags = tuple(dict.fromkeys((*first.tags, *second.tags)))
    if captions == first.captions and tags == first.tags:
        raise Refused("duplicate_key")
    lost = dict.fromkeys((*first.lost, *second.lost))
    lost |= {"too_many_captions": None} if len(captions) > MAX_CAPTIONS else {}
    lost |= {"too_many_tags": None} if len(tags) > MAX_TAGS else {}
    licence = first.licence or second.licence
    return Described(captions[:MAX_CAPTIONS], first.conditions, tags[:MAX_TAGS], licence, tuple(lost))


def name_of(options: Options, default: str) -> str:
    """The data set that records of a source name."""
    return options.source or default.encode(errors="replace").decode()
