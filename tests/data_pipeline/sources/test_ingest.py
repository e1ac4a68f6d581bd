import json
import os

import pytest

from data_pipeline.records.schema import MAX_CAPTION_CHARS, Caption, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources import REASONS, Options
from data_pipeline.sources import ingest as ingestion
from data_pipeline.sources.fields import MAX_JSON_BYTES


@pytest.fixture
def src(tmp_path):
    (tmp_path / "pets").mkdir()
    return tmp_path / "pets"


def put(folder, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def ingest(src, **options):
    report = ingestion.ingest(src, src.parent / "out", Options(**options), progress=False)
    records = list(RecordFolder(src.parent / "out"))
    assert report.records == len(records)
    assert set(report.refused.counts) <= set(REASONS)
    return records, report.refused.counts


def test_captions_beside_images(src):
    put(src, {"b.JPG": b"bytes", "b.txt": "\ufefftwo\nlines \n", "a/c.png": b"", "a/c.txt": "below", "notes.txt": "x"})
    records, refused = ingest(src, licence="CC0")
    assert records == [
        Record("a/c.png", b"", (Caption("below"),), "pets", "CC0"),
        Record("b.JPG", b"bytes", (Caption("two\nlines"),), "pets", "CC0"),
    ]
    assert refused == {}


def test_hostile_folder(src, tmp_path):
    put(tmp_path, {"secret.png": b"secret", "secret.txt": "secret", "elsewhere/x.png": b"x"})
    put(src, {"good.png": b"1", "good.txt": "fine", "big.png": b"123456", "big.txt": "fine"})
    captions = {
        "bare": None,
        "blank": " \n",
        "long": "x" * 1_000_000,
        "binary": b"\xff\xfe\0",
        "link": None,
        "pipe": "x",
    }
    for name, caption in captions.items():
        put(src, {f"{name}.png": b"1"} | ({f"{name}.txt": caption} if caption is not None else {}))
    put(src, {"long2.png": b"1", "long2.txt": "é" * (MAX_CAPTION_CHARS + 1)})
    (src / "link.txt").symlink_to(tmp_path / "secret.txt")
    (src / "stolen.png").symlink_to(tmp_path / "secret.png")
    put(src, {"stolen.txt": "fine"})
    (src / "away").symlink_to(tmp_path / "elsewhere")
    (src / "loop.png").symlink_to("loop.png")
    (src / "inside.png").symlink_to("good.png")
    put(src, {"inside.txt": "a link that stays inside"})
    (src / "pipe.png").unlink()
    os.mkfifo(src / "pipe.png")
    with open(os.fsencode(src) + b"/\xff.png", "wb"):
        pass
    records, refused = ingest(src, max_image_bytes=5)
    assert [record.key for record in records] == ["good.png", "inside.png"]
    assert refused == {
        "missing_caption": 2,
        "caption_too_long": 2,
        "not_utf8": 1,
        "outside_folder": 2,
        "linked_folder": 1,
        "unreadable": 1,
        "not_a_file": 1,
        "bad_name": 1,
        "too_large": 1,
    }


def test_metadata(src):
    lines = [
        {"file_name": "b.png", "text": "plain", "other": 1},
        {
            "file_name": "./a.png",
            "captions": ["one", {"text": "two", "kind": "text", "language": "de"}],
            "licence": "CC0",
        },
    ]
    put(src, {"a.png": b"a", "b.png": b"b", "b.txt": "not read", "c.png": b"c", "c.txt": "not read"})
    put(src, {"metadata.jsonl": "\n\n".join(json.dumps(line) for line in lines)})
    records, refused = ingest(src, source="zoo")
    assert records == [
        Record("a.png", b"a", (Caption("one"), Caption("two", "text", "de")), "zoo", "CC0"),
        Record("b.png", b"b", (Caption("plain"),), "zoo"),
    ]
    assert refused == {"not_listed": 1}


def _line(**fields) -> bytes:
    return json.dumps({"file_name": "x.png", "text": "fine"} | fields).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad_json"),
        (b"[1]", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"file_name": "x.png", "text": ' + b"9" * 10_000 + b"}", "bad_json"),
        (b'"' + b"x" * (2 * MAX_JSON_BYTES) + b'"', "bad_json"),
        (b'{"file_name": "\xff.png"}', "not_utf8"),
        (b'{"text": "no name"}', "unknown_keys"),
        (_line(file_name=["x.png"]), "bad_metadata"),
        (_line(text=3), "bad_metadata"),
        (b'{"file_name": "x.png", "captions": [{"text": "x", "kind": "instruction"}]}', "bad_metadata"),
        (_line(text="UTF-16 read as UTF-8: x\0y\0"), "not_utf8"),
        (_line(text="\ud800"), "bad_metadata"),
        (b'{"file_name": "x.png"}', "missing_caption"),
        (b'{"file_name": "x.png", "captions": []}', "missing_caption"),
        (_line(text="\t"), "missing_caption"),
        (_line(text="x" * (MAX_CAPTION_CHARS + 1)), "caption_too_long"),
        (_line(file_name="absent.png"), "missing_file"),
        (_line(file_name="good.png"), "duplicate_key"),
        (_line(file_name=".//good.png"), "duplicate_key"),
        (_line(file_name="../pets/x.png"), "outside_folder"),
        (_line(file_name="a/../x.png"), "outside_folder"),
        (_line(file_name="/etc/passwd"), "outside_folder"),
        (_line(file_name="x\0.png"), "bad_name"),
        (_line(file_name="\ud800.png"), "bad_name"),
        (_line(file_name="x" * 2000), "bad_name"),
        (_line(file_name="x" * 1000), "unreadable"),
        (_line(file_name="."), "not_a_file"),
    ],
)
def test_hostile_line_is_counted_and_the_rest_is_read(src, line, reason):
    good, last = _line(file_name="good.png"), _line(file_name="last.png")
    put(src, {"good.png": b"g", "x.png": b"x", "last.png": b"l", "metadata.jsonl": b"\n".join([good, line, last])})
    records, refused = ingest(src)
    assert [record.key for record in records] == ["good.png", "last.png"]
    refused.pop("not_listed", None)  # x.png, where the bad line does not name it
    assert refused == {reason: 1}


def test_metadata_that_leaves_the_folder_is_refused(src, tmp_path):
    put(tmp_path, {"metadata.jsonl": _line()})
    (src / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="leaves the folder"):
        ingest(src)


def test_nothing_usable_names_the_folder_and_what_was_looked_for(src):
    put(src, {"cat.png": b"x"})
    with pytest.raises(ValueError, match=r"pets: looked for a metadata.jsonl.*\.jpeg.*\.txt.*missing_caption"):
        ingest(src)
    assert not (src.parent / "out").exists()
    with pytest.raises(ValueError, match="neither a folder"):
        ingest(src / "cat.png")


def test_ingestion_is_deterministic(demo, tmp_path):
    images, _, folder, report = demo
    again = ingestion.ingest(images, tmp_path / "again", records_per_shard=10, progress=False)
    assert RecordFolder(tmp_path / "again").shards == RecordFolder(folder).shards
    assert again.refused == report.refused


FOUR = ["file_name,text", "1.png,one", "2.png,two", '3.png,"three\nlines"', "4.png,four \ufffd"]


@pytest.mark.parametrize(
    ("row", "captions", "counts"),
    [
        ("2.png,two", ["two"], {}),
        ('2.png,"two" more', ["two more"], {}),
        ('2.png,two" more', ['two" more'], {}),
        ('2.png,"two', [], {"broken_row": 1, "not_listed": 1}),
        ('2.png,"two\n5.png,"five', [], {"broken_row": 2, "not_listed": 1}),
        ("2.png," + "x" * 140_000, [], {"caption_too_long": 1}),
        ("2.png," + "x" * (2 * MAX_JSON_BYTES), [], {"broken_row": 1, "not_listed": 1}),
        (b"2.png,\xff", [], {"not_utf8": 1, "not_listed": 1}),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_row_of_a_table_costs_only_itself(src, row, captions, counts, end):
    lines = [line.encode() if isinstance(line, str) else line for line in (*FOUR[:2], row, *FOUR[3:])]
    content = b"\n".join(lines).replace(b"\n", end.encode())
    put(src, {f"{name}.png": b"x" for name in range(1, 5)} | {"metadata.csv": content})
    records, refused = ingest(src)
    texts = [caption.text for record in records for caption in record.captions]
    assert texts == ["one", *captions, "three\nlines", "four \ufffd"]
    assert refused == counts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_end_as_in_other_text_files(src, end):
    put(src, {"a.png": b"a", "b.png": b"b"})
    put(src, {"metadata.jsonl": end.join(_line(file_name=name).decode() for name in ("a.png", "b.png"))})
    assert [record.key for record in ingest(src)[0]] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", "", None),
        ("metadata.jsonl", " \n", None),
        ("metadata.json", "[]", None),
        ("metadata.jsonl", "{broken", "bad_json"),
        ("metadata.jsonl", '{"title": "pets"}', "unknown_keys"),
    ],
)
def test_metadata_that_names_no_image_does_not_hide_the_images(src, name, content, reason):
    put(src, {"a.png": b"a", "a.txt": "a cat", name: content})
    records, refused = ingest(src)
    assert [record.captions for record in records] == [(Caption("a cat"),)]
    assert refused == ({reason: 1} if reason else {})


@pytest.mark.parametrize("beside", [{"text": "   "}, {"captions": []}, {"text": None}, {"captions": {}}])
def test_a_blank_value_leaves_the_field_to_another_key(src, beside):
    row = {"file_name": "a.png", "caption": "a cat", "license": "CC0"} | beside
    put(src, {"a.png": b"a", "metadata.jsonl": json.dumps(row)})
    assert ingest(src)[0] == [Record("a.png", b"a", (Caption("a cat"),), "pets", "CC0")]


def test_keys_that_no_field_reads_are_named(src):
    row = {"text": "a cat", "caption": "cat", "prompt": "", "licence": "CC0", "url": "x"}
    put(src, {"a.png": b"a", "a.json": json.dumps(row), "b.png": b"b", "b.json": json.dumps(row)})
    report = ingestion.ingest(src, src.parent / "out", progress=False)
    assert report.unused == report.to_dict()["unused_keys"] == {"caption": 2, "url": 2}
    assert "'caption' (2), 'url' (2)" in report.table().title
