import msgpack
import pytest

from data_pipeline.records import schema
from data_pipeline.records.schema import Caption, Line, Record, decode_record, encode_record

CAPTIONS = (Caption("a cat"), Caption('"OPEN"', "text", "en"), Caption("一只猫", "knowledge", "zh-Hans"))
RECORD = Record("a/cat.png", b"\x89PNG\0\xff", CAPTIONS, "pets", "CC0 1.0", tags=("nature/cat",))
INSTRUCTION = Caption("make it night", "instruction", "en")
EDIT = Record("e", b"after", (INSTRUCTION, Caption("a street")), "edits", conditions=(b"before", b"style"))


WITH_LINES = Record("l", b"x", (), "s", lines=(Line("OPEN", (3, 4, 50, 21)), Line("日本", (0, 0, 9, 9))))


@pytest.mark.parametrize("record", [RECORD, EDIT, Record("k", b"", (), "s"), WITH_LINES])
def test_round_trip(record):
    assert decode_record(encode_record(record)) == record


def test_records_without_lines_are_stored_as_before():
    stored = [msgpack.unpackb(encode_record(record)) for record in (RECORD, WITH_LINES)]
    assert [fields["schema"] for fields in stored] == [2, 3] and "lines" not in stored[0]


def _stored(**changes) -> bytes:
    fields = msgpack.unpackb(encode_record(RECORD))
    return msgpack.packb({name: value for name, value in (fields | changes).items() if value is not KeyError})


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "not readable"),
        (encode_record(RECORD)[:-3], "not readable"),
        (encode_record(RECORD) + b"\0", "not readable"),
        (b"\xdd\xff\xff\xff\xff", "not readable"),  # an array that announces four billion elements
        (b"\x91" * 5000 + b"\xc0", "not readable"),  # nesting
        (b"\xc7\x01\x05\x00", "not readable"),  # an extension type
        (msgpack.packb([1]), "must have the fields"),
        (_stored(schema=4, masks=[b""]), "schema 4"),
        (_stored(schema=3), "must have the fields"),
        (_stored(lines=[]), "must have the fields"),
        (_stored(schema=3, lines={}), "lines that are not a list"),
        (_stored(schema=3, lines=[{"text": "x"}]), "stored line"),
        (_stored(schema=3, lines=[{"text": "x", "box": 3}]), "box that is not a list"),
        (_stored(schema=3, lines=[{"text": "x", "box": [0, 0, 1]}]), "the box"),
        (_stored(schema=3, lines=[{"text": "x", "box": [0, 0, 1, True]}]), "the box"),
        (_stored(schema=3, lines=[{"text": "x", "box": [5, 0, 5, 1]}]), "the box"),
        (_stored(schema=3, lines=[{"text": "x", "box": [-1, 0, 5, 1]}]), "the box"),
        (_stored(schema=3, lines=[{"text": 1, "box": [0, 0, 1, 1]}]), "line 1"),
        (_stored(source=KeyError), "must have the fields"),
        (_stored(extra=1), "must have the fields"),
        (_stored(image="text"), "image must be"),
        (_stored(captions={}), "captions that are not a list"),
        (_stored(conditions=b""), "conditions that are not a list"),
        (_stored(conditions=[b""]), "condition images need an instruction"),
        (_stored(conditions=[""] * 2), "image must be"),
        (_stored(tags=[3]), "tag 3"),
        (_stored(captions=[{"text": "x"}]), "stored caption"),
        (_stored(captions=[{"text": 3, "kind": "general", "language": None}]), "caption 3"),
        (_stored(licence=3), "licence 3"),
    ],
)
def test_hostile_payloads_are_refused(payload, message):
    with pytest.raises(ValueError, match=message):
        decode_record(payload)


def test_limits(monkeypatch):
    stored = encode_record(Record("k", b"123456", (), "s"))
    monkeypatch.setattr(schema, "MAX_IMAGE_BYTES", 5)
    with pytest.raises(ValueError, match="not readable"):
        decode_record(stored)
    with pytest.raises(ValueError, match="at most 5 bytes"):
        Record("k", b"123456", (), "s")
    with pytest.raises(ValueError, match="20001 characters"):
        Caption("x" * 20_001)
    with pytest.raises(ValueError, match="65 captions"):
        Record("k", b"", (Caption("x"),) * 65, "s")


def test_edits_have_an_instruction_and_at_most_ten_condition_images():
    with pytest.raises(ValueError, match="11 condition images"):
        Record("k", b"", (INSTRUCTION,), "s", conditions=(b"",) * 11)
    with pytest.raises(ValueError, match="an instruction needs them"):
        Record("k", b"", (INSTRUCTION,), "s")


@pytest.mark.parametrize("fields", [{"text": " "}, {"text": "\ud800"}, {"kind": "poem"}, {"language": "e n"}])
def test_bad_captions(fields):
    with pytest.raises(ValueError):
        Caption(**({"text": "a cat"} | fields))
