"""Tar files, tables and edits become records; hostile parts are counted."""

import argparse
import dataclasses
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.records.schema import MAX_CAPTION_CHARS, Caption, Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources import REASONS, Options
from data_pipeline.sources.ingest import ingest
from data_pipeline.synthesis.edits.synthesis import synthesize_edits
from data_pipeline.synthesis.text.synthesis import synthesize_text
from qi2_jax.cli import data

TURN = Caption("make it night", "instruction")


def read(src, out, **options):
    report = ingest(src, out, Options(**options), progress=False)
    assert set(report.refused.counts) <= set(REASONS)
    return list(RecordFolder(out)), report.refused.counts


def write_tar(path, members) -> None:
    """Writes (name or TarInfo, bytes) members."""
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_edits_in_a_folder(tmp_path):
    src = tmp_path / "edits"
    src.mkdir()
    for name in ("after.png", "before.png", "style.png", "alone.png"):
        (src / name).write_bytes(name.encode())
    lines = [
        {
            "file_name": "after.png",
            "conditions": ["before.png", "./style.png"],
            "instruction": "make it night",
            "tags": ["a/b"],
        },
        {"file_name": "alone.png", "instruction": "make it night"},
        {"file_name": "style.png", "conditions": ["before.png"], "text": "a street"},
        {"file_name": "before.png", "conditions": ["../x.png"], "instruction": "x"},
        {"file_name": "x.png", "conditions": ["absent.png"] * 11, "instruction": "x"},
        {"file_name": "y.png", "captions": [{"text": "x", "kind": "instruction"}]},
    ]
    (src / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records, refused = read(src, tmp_path / "out")
    conditions = (b"before.png", b"style.png")
    assert records == [Record("after.png", b"after.png", (TURN,), "edits", conditions=conditions, tags=("a/b",))]
    assert refused == {"bad_metadata": 2, "missing_condition": 1, "outside_folder": 1, "missing_instruction": 1}


def test_a_file_of_json_lines_names_files_beside_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"a")
    (tmp_path / "set" / "some.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "fine"}))
    assert read(tmp_path / "set" / "some.jsonl", tmp_path / "out")[0] == [
        Record("a.png", b"a", (Caption("fine"),), "set")
    ]


def test_json_beside_an_image(tmp_path):
    src = tmp_path / "set"
    src.mkdir()
    (src / "a.png").write_bytes(b"a")
    (src / "a.json").write_text(json.dumps({"captions": [{"text": "eins", "language": "de"}], "licence": "CC0"}))
    (src / "b.png").write_bytes(b"b")
    (src / "b.json").write_text("[]")
    records, refused = read(src, tmp_path / "out")
    assert records == [Record("a.png", b"a", (Caption("eins", language="de"),), "set", "CC0")]
    assert refused == {"bad_json": 1}


def test_tar(tmp_path):
    members = [
        ("./a/1.jpg", b"one"),
        ("./a/1.txt", b"first"),
        ("./a/1.json", b'{"licence": "CC0", "tags": ["x"], "width": 3}'),
        ("./a/1.cls", b"7"),
        ("2.png", b"after"),
        ("2.condition_1.png", b"style"),
        ("2.condition_0.webp", b"before"),
        ("2.instruction.txt", b"make it night"),
    ]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "00.tar", members)
    write_tar(tmp_path / "tars" / "01.tar", [("1.png", b"more"), ("1.txt", b"again")])
    records, refused = read(tmp_path / "tars", tmp_path / "out", source="web")
    assert records == [
        Record("00/a/1", b"one", (Caption("first"),), "web", "CC0", tags=("x",)),
        Record("00/2", b"after", (TURN,), "web", conditions=(b"before", b"style")),
        Record("01/1", b"more", (Caption("again"),), "web"),
    ]
    assert refused == {}


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../x.png", b"x")], "outside_folder"),
        ([("/x.png", b"x")], "outside_folder"),
        ([("a\\..\\x.png", b"x")], "outside_folder"),
        ([("x.png", b"123456"), ("x.txt", b"fine")], "too_large"),
        ([(link("x.png"), b""), ("x.txt", b"fine")], "not_a_file"),
        ([("x.png", b"x")], "missing_caption"),
        ([("x.txt", b"fine")], "missing_image"),
        ([("x.png", b"x"), ("x.jpg", b"x"), ("x.txt", b"fine")], "bad_metadata"),
        ([("x.png", b"x"), ("x.txt", b"\xff")], "not_utf8"),
        ([("x.png", b"x"), ("x.txt", b"x" * 4 * MAX_CAPTION_CHARS + b"x")], "caption_too_long"),
        ([("x.png", b"x"), ("x.json", b"[1]")], "bad_json"),
        ([("x.png", b"x"), ("x.json", b" " * (1 << 20) + b"{}")], "bad_json"),
        ([("x.png", b"x"), ("x.condition_1.png", b"x"), ("x.instruction.txt", b"x")], "missing_condition"),
        ([("x.png", b"x"), ("x.condition_0.png", b"x"), ("x.txt", b"x")], "missing_instruction"),
        ([("good.png", b"x"), ("good.txt", b"x")], "duplicate_key"),
        ([("between.png", b"x"), ("between.txt", b"x")], "duplicate_key"),
        ([("between.png", b"x")], "duplicate_key"),
        ([(".x.png", b"x"), (".x.txt", b"x")], "bad_name"),
        ([("a/.x.png", b"x")], "bad_name"),
    ],
)
def test_hostile_members_are_counted_and_the_rest_is_read(tmp_path, members, reason):
    good, last = [("good.png", b"g"), ("good.txt", b"fine")], [("last.png", b"l"), ("last.txt", b"fine")]
    between = [("between.png", b"b"), ("between.txt", b"fine")]
    write_tar(tmp_path / "x.tar", [*good, *between, *members, *last])
    records, refused = read(tmp_path / "x.tar", tmp_path / "out", max_image_bytes=5)
    assert [record.key for record in records] == ["x/good", "x/between", "x/last"]
    assert refused == {reason: 1}


def test_a_tar_that_is_cut_off_keeps_what_came_before(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", b"a"), ("a.txt", b"fine"), ("b.png", b"b" * 5000), ("b.txt", b"fine")])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"b" * 5000) + 100])
    records, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert [record.key for record in records] == ["x/a"]
    assert refused["broken_file"] == 1


def test_an_extended_header_that_announces_gigabytes_is_not_read(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 33
    write_tar(tmp_path / "x.tar", [("a.png", b"a"), ("a.txt", b"fine")])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 4 * 512] + header.tobuf() + whole[4 * 512 :])
    records, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert [record.key for record in records] == ["x/a"] and refused == {"broken_file": 1}


def test_parquet(tmp_path):
    rows = [
        {"img": {"bytes": b"1", "path": "a"}, "caption": "one", "tags": "cat", "before": None, "how": None},
        {
            "img": {"bytes": b"2", "path": None},
            "caption": None,
            "tags": None,
            "before": [{"bytes": b"0"}],
            "how": "make it night",
        },
        {"img": {"bytes": None, "path": "b"}, "caption": "three", "tags": None, "before": None, "how": None},
        {"img": {"bytes": b"4", "path": None}, "caption": None, "tags": None, "before": None, "how": None},
        {"img": {"bytes": b"123456", "path": None}, "caption": "five", "tags": None, "before": None, "how": None},
    ]
    (tmp_path / "t").mkdir()
    pq.write_table(pa.Table.from_pylist(rows * 10), tmp_path / "t" / "data.parquet", row_group_size=7)
    columns = {"image": "img", "text": "caption", "conditions": "before", "instruction": "how"}
    records, refused = read(tmp_path / "t", tmp_path / "out", columns=columns, licence="CC0", max_image_bytes=5)
    assert records[:2] == [
        Record("data/00000000", b"1", (Caption("one"),), "data", "CC0", tags=("cat",)),
        Record("data/00000001", b"2", (TURN,), "data", "CC0", conditions=(b"0",)),
    ]
    assert len(records) == 20
    assert refused == {"missing_image": 10, "missing_caption": 10, "too_large": 10}


def test_parquet_of_other_columns_is_refused_with_the_way_out(tmp_path):
    pq.write_table(pa.table({"jpg": [b"x"], "caption": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no column `image`.*'jpg', 'caption'.*--column image=NAME"):
        read(tmp_path / "x.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match="nothing"):
        read(tmp_path / "x.parquet", tmp_path / "out", columns={"image": "nothing"})


def test_a_file_that_is_not_a_table_is_counted(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ValueError, match=r"1 broken_file, such as x\.parquet"):
        read(tmp_path / "x.parquet", tmp_path / "out")


def test_several_sources_become_one_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "set").mkdir(parents=True)
        (tmp_path / name / "set" / "1.png").write_bytes(name.encode())
        (tmp_path / name / "set" / "1.txt").write_text("a caption")
    (tmp_path / "b" / "set" / "2.png").write_bytes(b"2")
    write_tar(
        tmp_path / "edits.tar",
        [("1.png", b"1"), ("1.condition_0.png", b"0"), ("1.instruction.txt", TURN.text.encode())],
    )
    edits, _ = read(tmp_path / "edits.tar", tmp_path / "made", licence="CC0")
    sources = [tmp_path / "a" / "set", tmp_path / "b" / "set", tmp_path / "made"]
    report = ingest(sources, tmp_path / "out", Options("web", "own"), progress=False)
    text = (Caption("a caption"),)
    assert list(RecordFolder(tmp_path / "out")) == [
        Record("set/1.png", b"a", text, "web", "own"),
        Record("set-2/1.png", b"b", text, "web", "own"),
        dataclasses.replace(edits[0], key="made/edits/1"),
    ]
    assert edits[0].source == "edits" and edits[0].licence == "CC0"
    assert report.records == 3 and report.refused.to_dict() == {"missing_caption": {"count": 1, "examples": ["2.png"]}}
    assert [(step.name, step.entered) for step in report.sources] == [("set", 1), ("set-2", 2), ("made", 1)]
    with pytest.raises(ValueError, match="is named twice"):
        ingest([sources[0], sources[0]], tmp_path / "again", progress=False)


def test_records_that_are_not_complete_are_refused_before_anything_is_written(tmp_path):
    write_tar(tmp_path / "x.tar", [("1.png", b"1"), ("1.txt", b"fine")])
    read(tmp_path / "x.tar", tmp_path / "made")
    (tmp_path / "made" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="its ingestion was interrupted"):
        ingest([tmp_path / "x.tar", tmp_path / "made"], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_does_not_affect_the_others(tmp_path):
    members = [(f"{n}.{suffix}", b"fine") for n in range(3) for suffix in ("png", "txt")]
    write_tar(tmp_path / "x.tar", members)
    ingest(tmp_path / "x.tar", tmp_path / "made", records_per_shard=1, progress=False)
    (tmp_path / "made" / "records-00001-of-00003.arrayrecord").write_bytes(b"damaged")
    records, refused = read(tmp_path / "made", tmp_path / "out")
    assert [record.key for record in records] == ["x/0", "x/2"] and refused == {"broken_file": 1}


def test_nulls_in_a_caption_of_a_table_mean_that_it_does_not_say(tmp_path):
    fields = pa.struct({"text": pa.string(), "kind": pa.string(), "language": pa.string()})
    captions = [
        [{"text": "one", "kind": None, "language": "en"}],
        [{"text": None, "kind": "general", "language": None}],
    ]
    table = pa.table({"image": [b"1", b"2"], "captions": pa.array(captions, pa.list_(fields))})
    pq.write_table(table, tmp_path / "x.parquet")
    records, refused = read(tmp_path / "x.parquet", tmp_path / "out")
    assert [record.captions for record in records] == [(Caption("one", "general", "en"),)]
    assert refused == {"bad_metadata": 1}


def test_metadata_members_of_macos_are_skipped(tmp_path):
    places = [(folder, f"{n}.{suffix}") for folder in ("", "./a/") for n in "01" for suffix in ("png", "txt")]
    members = [(f"{folder}{mark}{name}", b"fine") for folder, name in places for mark in ("._", "")]
    write_tar(tmp_path / "x.tar", [(".DS_Store", b"mac"), *members])
    records, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert [record.key for record in records] == ["x/0", "x/1", "x/a/0", "x/a/1"] and refused == {}


def test_columns_are_of_tables(tmp_path):
    write_tar(tmp_path / "x.tar", [("1.png", b"1"), ("1.txt", b"fine")])
    with pytest.raises(ValueError, match="contain neither"):
        read(tmp_path / "x.tar", tmp_path / "out", columns={"image": "img"})
    for wrong in ("image", "image=", "=img"):
        arguments = ["ingest", str(tmp_path / "x.tar"), "--out", str(tmp_path / "out"), "--column", wrong]
        parser = argparse.ArgumentParser()
        data.add_arguments(parser)
        with pytest.raises(ValueError, match="is not FIELD=NAME"):
            data.main(parser.parse_args(arguments))


def test_the_command_joins_sources(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("1.png", b"1"), ("1.txt", b"fine")])
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    sources = [str(tmp_path / f"{name}.tar") for name in "ab"]
    data.main(parser.parse_args(["ingest", *sources, "--out", str(tmp_path / "out")]))
    assert [record.key for record in RecordFolder(tmp_path / "out")] == ["a/a/1", "b/b/1"]


def test_an_impossible_output_is_refused_before_any_source_is_read(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", [("1.png", b"1"), ("1.txt", b"fine")])
    read(tmp_path / "x.tar", tmp_path / "made")
    for work in (
        lambda: ingest([tmp_path / "absent"], tmp_path / "made", progress=False),
        lambda: synthesize_edits(tmp_path / "absent", tmp_path / "made", progress=False),
        lambda: synthesize_text(tmp_path / "made", corpus=tmp_path / "absent", progress=False),
    ):
        with pytest.raises(ValueError, match="already contains records"):
            work()
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["score", str(tmp_path), "--json", str(tmp_path / "absent" / "x.json")])
    assert "its folder does not exist" in capsys.readouterr().err
