"""Turns the metadata of one sample into the captions, tags and licence of its record.

An optional part that cannot be used is left out of the record and counted. A sample is refused if no caption is left,
unless `Options.without_captions` accepts images without captions.
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

MAX_JSON_BYTES = 1 << 20  # metadata of one sample
NO_CAPTION = "no_caption"  # key of `base.LOST`


@dataclass(frozen=True)
class Description:
    """The fields of one sample's record that metadata supplies.

    Attributes:
      conditions: file names of the condition images.
      lost: keys of `base.LOST` for the parts that could not be used.
    """

    captions: tuple[Caption, ...]
    conditions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    licence: str | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionFile:
    """A text file with one caption.

    Attributes:
      content: caption, or the reason why the file cannot be used.
      kind: INSTRUCTION, or None for a caption.
    """

    content: str | Refused
    kind: str | None = None


def parse_json(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      Refused: if the data is not a JSON object or exceeds a megabyte.
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
      Refused: if the bytes are not text.
    """
    try:
        return read_text(data)
    except ValueError:
        raise Refused("not_utf8") from None


def read_caption_file(content: bytes | Refused, kind: str | None = None) -> CaptionFile:
    """The whole content of a text file as one caption."""
    try:
        return CaptionFile(content if isinstance(content, Refused) else decode_text(content), kind)
    except Refused as refusal:
        return CaptionFile(refusal, kind)


def describe(fields: dict[str, Any], options: Options, texts: Sequence[CaptionFile] = ()) -> Description:
    """Reads the known fields and ignores others.

    Args:
      fields: values by our names, see `layouts`: `text` (one general caption), `captions` (a list of strings or of
        {text, kind, language}) or both, all optional for an edit; for an edit `instruction` (a string, or a list like
        `captions`) and `conditions` (a list of file names); `tags` (a list, or a string with commas); `licence`.
      options: options of reading, with the licence to use if the fields contain none.
      texts: caption files.

    Raises:
      Refused: if there is no usable caption and the options require one, or the condition images are not a list of
        names.
    """
    instructions, general = _as_list(fields, "instruction"), _as_list(fields, "captions") + _as_list(fields, "text")
    conditions = _as_list(fields, "conditions")
    if len(conditions) > MAX_CONDITIONS or not all(isinstance(name, str) for name in conditions):
        raise Refused("bad_metadata")
    parts: list[tuple[Any, str | None]] = [(value, INSTRUCTION) for value in instructions]
    parts += [(text.content, text.kind) for text in texts] + [(value, None) for value in general]
    captions, lost = _read_captions(parts, required=not options.without_captions)
    tags, lost_tags = _read_tags(fields.get("tags"))
    own_licence = fields.get("licence")
    if own_licence is None or (isinstance(own_licence, str) and not own_licence.strip()):
        own_licence = options.licence
    elif not is_name(own_licence):
        own_licence, lost_tags = None, [*lost_tags, "bad_licence"]
    return Description(captions, tuple(conditions), tags, own_licence, (*lost, *lost_tags))


def _as_list(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_captions(parts: Sequence[tuple[Any, str | None]], required: bool) -> tuple[tuple[Caption, ...], list[str]]:
    captions: dict[Caption, None] = {}  # in order, without repetitions
    lost: list[str] = []
    for value, kind in parts:
        try:
            if isinstance(value, Refused):
                raise value
            caption, lost_parts = _read_caption(value, kind)
            captions[caption] = None
            lost += lost_parts
        except Refused as refusal:
            lost.append(refusal.reason)
    if not captions and required:
        raise Refused(lost[0] if lost else "missing_caption")
    if not captions:
        lost.append(NO_CAPTION)
    if len(captions) > MAX_CAPTIONS:
        lost.append("too_many_captions")
    return tuple(captions)[:MAX_CAPTIONS], lost


def _read_caption(value: object, kind: str | None) -> tuple[Caption, list[str]]:
    """A caption from a string or from {text, kind, language}, and keys of LOST for its unusable parts.

    Args:
      value: string or dict.
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
    language, caption_kind = fields.get("language"), fields.get("kind")
    if language is not None:
        # Programs write `zh_CN` and `en_US.UTF-8`, as locales are called.
        language = language.split(".")[0].replace("_", "-") if isinstance(language, str) else language
        if not is_language(language):
            language, lost = None, ["bad_language"]
    if caption_kind is not None and caption_kind not in KINDS:
        caption_kind, lost = None, [*lost, "unknown_kind"]
    caption_kind = caption_kind or kind or "general"
    if (caption_kind == INSTRUCTION) != (kind == INSTRUCTION):
        raise Refused("bad_metadata")
    try:
        return Caption(text.strip(), caption_kind, language), lost
    except ValueError:  # a lone surrogate
        raise Refused("bad_metadata") from None


def _read_tags(value: Any) -> tuple[tuple[str, ...], list[str]]:
    """The first usable tags of a list, or of a string with commas, and keys of LOST for the others."""
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


def make_record(key: str, image: bytes, conditions: tuple[bytes, ...], described: Description, source: str) -> Record:
    """A record from parts whose limits have been checked.

    Raises:
      Refused: for condition images without an instruction, or an instruction without condition images.
    """
    has_instruction = any(caption.kind == INSTRUCTION for caption in described.captions)
    if conditions and not has_instruction:
        raise Refused("missing_instruction")
    if has_instruction and not conditions:
        raise Refused("missing_condition")
    return Record(key, image, described.captions, source, described.licence, conditions, described.tags)


def merge(first: Description, second: Description) -> Description:
    """Merges two descriptions of one image or of one edit.

    Raises:
      Refused: if the second adds nothing.
    """
    captions = tuple(dict.fromkeys((*first.captions, *second.captions)))
    tags = tuple(dict.fromkeys((*first.tags, *second.tags)))
    if captions == first.captions and tags == first.tags:
        raise Refused("duplicate_key")
    lost = dict.fromkeys((*first.lost, *second.lost))
    if captions:
        lost.pop(NO_CAPTION, None)
    lost |= {"too_many_captions": None} if len(captions) > MAX_CAPTIONS else {}
    lost |= {"too_many_tags": None} if len(tags) > MAX_TAGS else {}
    licence = first.licence or second.licence
    return Description(captions[:MAX_CAPTIONS], first.conditions, tags[:MAX_TAGS], licence, tuple(lost))


def source_name(options: Options, default: str) -> str:
    """The name of the data set in the records of a source."""
    return options.source or default.encode(errors="replace").decode()
