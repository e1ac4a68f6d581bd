"""Records: one image with its captions, or an edit, and how a record is stored.

One msgpack map per record with exactly these fields; records without `lines` have schema 2, others schema 3:

| field      | msgpack type | meaning                                                                     |
| ---------- | ------------ | --------------------------------------------------------------------------- |
| schema     | int          | 2 or 3                                                                      |
| key        | str          | unique name: path in its folder, archive or table, with forward slashes     |
| image      | bin          | the original image file: still encoded, not rotated, never re-compressed    |
| conditions | array of bin | for an edit, one to ten source image files in the order of the instruction  |
| captions   | array of map | {text: str, kind: str, language: str or nil}; may be empty for an image     |
| tags       | array of str | classes of the image such as `design/slide`, for quotas; may be empty       |
| source     | str          | name of the data set                                                        |
| licence    | str or nil   | licence and credit as free text; nil when unknown                           |
| lines      | array of map | schema 3: {text: str, box: [left, top, right, bottom]} of every text line   |

An edit has at least one caption of the kind `instruction`; its `image` is the result of the instruction. A reader
refuses schema numbers and fields that it does not know. The box of a line contains its ink, in pixels of the upright
image.
"""

import re
from dataclasses import dataclass

import msgpack

SCHEMA, LINES_SCHEMA = 2, 3
SCHEMAS = (SCHEMA, LINES_SCHEMA)
INSTRUCTION = "instruction"
KINDS = ("general", "text", "knowledge", "structured", INSTRUCTION)
MAX_CONDITIONS = 10
MAX_TAGS, MAX_TAG_CHARS = 16, 64
MAX_IMAGE_BYTES = 64 << 20
MAX_CAPTION_CHARS = 20_000  # a caption of 1,024 tokens has about 5,000; structured ones are longer
MAX_CAPTIONS = 64
MAX_LINES, MAX_LINE_CHARS = 4096, 4096
MAX_PIXEL = 1 << 20  # of the box of a line
MAX_NAME_CHARS = 1024  # for key, source and licence

_FIELDS = {"schema", "key", "image", "conditions", "captions", "tags", "source", "licence"}
_CAPTION_FIELDS = {"text", "kind", "language"}
_LINE_FIELDS = {"text", "box"}
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def is_language(value: object) -> bool:
    """Whether a value is a language tag such as `en` or `zh-Hans`."""
    return isinstance(value, str) and _LANGUAGE.fullmatch(value) is not None


@dataclass(frozen=True)
class Caption:
    """One description of an image.

    Attributes:
      text: up to MAX_CAPTION_CHARS characters, not blank.
      kind: `general` (describes what is visible), `text` (quotes the writing in the image), `knowledge` (names and
        facts), `structured` (fields, JSON), `instruction` (for an edit).
      language: BCP 47 tag such as `en` or `zh-Hans`; None if unknown.

    Raises:
      ValueError: for a blank or overlong text, an unknown kind, a malformed language tag.
    """

    text: str
    kind: str = "general"
    language: str | None = None

    def __post_init__(self) -> None:
        _check_text("caption", self.text, MAX_CAPTION_CHARS)
        if self.kind not in KINDS:
            raise ValueError(f"caption kind {self.kind!r} is unknown; choose one of {KINDS}")
        if self.language is not None and not is_language(self.language):
            raise ValueError(f"caption language {self.language!r} is not a language tag such as 'en' or 'zh-Hans'")


@dataclass(frozen=True)
class Line:
    """A line of text in an image.

    Attributes:
      text: text of the line, not blank.
      box: left, top, right and bottom of its ink, in pixels of the upright image; right and bottom are exclusive.

    Raises:
      ValueError: for a blank or overlong text, or a box that is empty or has a number out of range.
    """

    text: str
    box: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        _check_text("line", self.text, MAX_LINE_CHARS)
        integers = isinstance(self.box, tuple) and len(self.box) == 4 and all(type(side) is int for side in self.box)
        left, top, right, bottom = self.box if integers else (0, 0, 0, 0)
        if not (0 <= left < right <= MAX_PIXEL and 0 <= top < bottom <= MAX_PIXEL):
            raise ValueError(
                f"line {self.text[:40]!r}: the box {self.box!r} must be integers 0 <= left < right and 0 <= top < "
                f"bottom, at most {MAX_PIXEL}"
            )


@dataclass(frozen=True)
class Record:
    """One image with its captions, or an edit; the fields are those of the schema above.

    Raises:
      ValueError: if a field has the wrong type or exceeds its limit (the message names it), for an edit without an
        instruction, and for an instruction without condition images.
    """

    key: str
    image: bytes
    captions: tuple[Caption, ...]
    source: str
    licence: str | None = None
    conditions: tuple[bytes, ...] = ()
    tags: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        _check_text("key", self.key, MAX_NAME_CHARS)
        _check_text("source", self.source, MAX_NAME_CHARS)
        if self.licence is not None:
            _check_text("licence", self.licence, MAX_NAME_CHARS)
        for image in (self.image, *self.conditions):
            if not isinstance(image, bytes) or len(image) > MAX_IMAGE_BYTES:
                raise ValueError(f"record {self.key!r}: the image must be at most {MAX_IMAGE_BYTES} bytes")
        if len(self.conditions) > MAX_CONDITIONS:
            raise ValueError(
                f"record {self.key!r} has {len(self.conditions)} condition images; at most {MAX_CONDITIONS} are kept"
            )
        if bool(self.conditions) != any(caption.kind == INSTRUCTION for caption in self.captions):
            raise ValueError(
                f"record {self.key!r}: condition images need an instruction, and an instruction needs them"
            )
        if len(self.tags) > MAX_TAGS:
            raise ValueError(f"record {self.key!r} has {len(self.tags)} tags; at most {MAX_TAGS} are kept")
        for tag in self.tags:
            _check_text("tag", tag, MAX_TAG_CHARS)
        if len(self.captions) > MAX_CAPTIONS:
            raise ValueError(f"record {self.key!r} has {len(self.captions)} captions; at most {MAX_CAPTIONS} are kept")
        if len(self.lines) > MAX_LINES:
            raise ValueError(f"record {self.key!r} has {len(self.lines)} lines; at most {MAX_LINES} are kept")

    @property
    def schema(self) -> int:
        """The schema in which the record is stored."""
        return LINES_SCHEMA if self.lines else SCHEMA


def encode_record(record: Record) -> bytes:
    """Encodes a record for storage. Equal records give equal bytes."""
    captions = [{"text": c.text, "kind": c.kind, "language": c.language} for c in record.captions]
    fields = {"schema": record.schema, "key": record.key, "image": record.image, "conditions": list(record.conditions)}
    fields |= {"captions": captions, "tags": list(record.tags), "source": record.source, "licence": record.licence}
    if record.lines:
        fields["lines"] = [{"text": line.text, "box": list(line.box)} for line in record.lines]
    return msgpack.packb(fields, use_bin_type=True)


def decode_record(payload: bytes) -> Record:
    """Decodes a stored record; safe for untrusted bytes.

    Raises:
      ValueError: if the payload is not a map with exactly the fields of the schema, within their limits.
    """
    try:
        fields = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_bin_len=MAX_IMAGE_BYTES,
            max_str_len=4 * MAX_CAPTION_CHARS,  # counted in bytes of UTF-8
            max_array_len=MAX_LINES,
            max_map_len=len(_FIELDS) + 8,  # a later schema with a few more fields gets the clear message below
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"a stored record is not readable: {error or type(error).__name__}") from None
    schema = fields.get("schema", SCHEMA) if isinstance(fields, dict) else SCHEMA
    if schema not in SCHEMAS:
        raise ValueError(f"a stored record has schema {schema!r}; this version reads schemas {SCHEMAS}")
    more = ("lines",) if schema == LINES_SCHEMA else ()
    _check_fields("record", fields, _FIELDS.union(more))
    for name in ("captions", "conditions", "tags", *more):
        if not isinstance(fields[name], list):
            raise ValueError(f"a stored record has {name} that are not a list")
    for caption in fields["captions"]:
        _check_fields("caption", caption, _CAPTION_FIELDS)
    captions = tuple(Caption(**caption) for caption in fields["captions"])
    for line in fields.get("lines", ()):
        _check_fields("line", line, _LINE_FIELDS)
        if not isinstance(line["box"], list):
            raise ValueError("a stored line has a box that is not a list")
    lines = tuple(Line(line["text"], tuple(line["box"])) for line in fields.get("lines", ()))  # type: ignore[arg-type]
    listed = tuple(fields["conditions"]), tuple(fields["tags"]), lines
    return Record(fields["key"], fields["image"], captions, fields["source"], fields["licence"], *listed)


def _check_text(name: str, text: object, limit: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} {text!r} must be a string that is not blank")
    if len(text) > limit:
        raise ValueError(f"{name} {text[:40]!r}... has {len(text)} characters; at most {limit} are kept")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text[:40]!r} cannot be written as UTF-8") from None


def _check_fields(name: str, value: object, expected: set[str]) -> None:
    present = set(value) if isinstance(value, dict) else type(value).__name__
    if present != expected:
        raise ValueError(f"a stored {name} must have the fields {sorted(expected)}, but has {present}")
