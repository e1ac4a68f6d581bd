"""Realistic folders: every file is read by its reader, or counted with a reason."""

import io
import json
import tarfile
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.records.schema import Caption
from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources import REASONS, Options
from data_pipeline.sources.ingest import ingest

LINES = [json.dumps({"file_name": f"{n}.jpg", "text": f"hills {n}"}) for n in range(3)]


def put(folder, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def pictures(count: int = 3) -> dict[str, bytes]:
    return {f"{n}.jpg": b"image %d" % n for n in range(count)}


def table(count: int = 2) -> bytes:
    buffer = io.BytesIO()
    rows = [{"image": {"bytes": b"row %d" % n, "path": None}, "text": f"row {n}"} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("1.png", b"tar"), ("1.txt", b"in a tar"), ("2.heic", b"x"), ("2.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(src, **options):
    out = src.parent / f"{src.name}-{len(options)}-out"
    report = ingest(src, out, Options(**options), progress=False)
    assert set(report.refused.counts) <= set(REASONS)
    records = list(RecordFolder(out))
    assert len({record.key for record in records}) == len(records) == report.records
    return records, report


def keys(records) -> list[str]:
    return [record.key for record in records]


def test_images_and_sets_that_are_not_read_are_counted_and_named(tmp_path):
    src = tmp_path / "phone"
    suffixes = ("jpg", "jfif", "jpe", "heic", "jxl", "zip", "tar.gz", "arrow", "jsonl")
    put(src, {f"{suffix}.{suffix}": b"x" for suffix in suffixes} | {f"{suffix}.txt": "hills" for suffix in suffixes})
    records, report = read(src)
    assert keys(records) == ["jfif.jfif", "jpe.jpe", "jpg.jpg"]
    assert report.refused.counts == {"not_read": 6}
    assert report.files == {".arrow": 1, ".heic": 1, ".jfif": 1, ".jpe": 1, ".jpg": 1, ".jsonl": 1, ".jxl": 1} | {
        ".tar.gz": 1,
        ".txt": 9,
        ".zip": 1,
    }
    assert ".heic" in str(report.table().title) and report.to_dict()["files"][".heic"] == 1


def test_images_tars_and_tables_of_one_folder_are_all_read(tmp_path):
    src = tmp_path / "mixed"
    put(src, pictures() | {f"{n}.txt": f"hills {n}" for n in range(3)})
    put(
        src, {"set.tar": tar(), "set.parquet": table(), "below/set.tar": tar(), "below/4.jpg": b"4", "below/4.txt": "4"}
    )
    records, report = read(src)
    expected = ["0.jpg", "1.jpg", "2.jpg", "below/4.jpg", "below/set/1", "set/00000000", "set/00000001", "set.tar/1"]
    assert keys(records) == expected
    assert report.refused.to_dict() == {"not_read": {"count": 2, "examples": ["below/set/2", "set.tar/2"]}}
    assert report.files == {".heic": 2, ".jpg": 4, ".parquet": 1, ".png": 2, ".tar": 2, ".txt": 8}


def test_a_folder_without_captions_is_read_whole_on_request(tmp_path):
    src = tmp_path / "plain"
    bare = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"image": b"row"}, {"image": b"other"}]), bare)
    put(src, pictures() | {"1.txt": "hills", "2.json": '{"width": 3}', "bare.parquet": bare.getvalue()})
    put(src, {"set.tar": tar(), "below/metadata.jsonl": '{"file_name": "4.jpg"}', "below/4.jpg": b"4"})
    put(src, {"edit/metadata.jsonl": '{"file_name": "5.jpg", "conditions": ["6.jpg"]}', "edit/5.jpg": b"5"})
    put(src, {"edit/6.jpg": b"6"})
    records, report = read(src)
    assert keys(records) == ["1.jpg", "set/1"]
    assert report.refused.counts["missing_caption"] == 6
    records, report = read(src, without_captions=True)
    plain = ["0.jpg", "2.jpg", "below/4.jpg", "bare/00000000", "bare/00000001"]
    assert [record.key for record in records if not record.captions] == plain
    assert [record.key for record in records if record.captions] == ["1.jpg", "set/1"]
    assert report.lost.counts == {"no_caption": 5}
    assert report.refused.counts == {"missing_instruction": 1, "not_read": 1}


def test_a_table_of_urls_next_to_a_tar_does_not_affect_the_tar(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://x.invalid"], "caption": ["x"]}), buffer)
    put(tmp_path / "web", {"00000.tar": tar(), "00000.parquet": buffer.getvalue(), "00000_stats.json": "{}"})
    records, report = read(tmp_path / "web")
    assert keys(records) == ["00000.tar/1"] and report.refused.counts == {"unknown_keys": 1, "not_read": 1}
    assert "'url', 'caption'" in report.refused.examples["unknown_keys"][0]


def test_data_sets_as_they_are_cloned(tmp_path):
    put(tmp_path / "hub", {"data/train-00000-of-00001.parquet": table(), "README.md": "#", ".gitattributes": "x"})
    assert keys(read(tmp_path / "hub")[0])[0] == "data/train-00000-of-00001/00000000"
    put(tmp_path / "split", {f"train/{name}": data for name, data in pictures().items()})
    put(tmp_path / "split", {"train/metadata.jsonl": "\n".join(LINES), "test/9.jpg": b"9", "test/9.txt": "a test"})
    records, report = read(tmp_path / "split")
    assert keys(records) == ["test/9.jpg", "train/0.jpg", "train/1.jpg", "train/2.jpg"] and not report.refused.total
    put(tmp_path / "csv", pictures() | {"metadata.csv": '\ufefffile_name,text\r\n0.jpg,hills\r\n1.jpg,"a, b"\r\n'})
    records, report = read(tmp_path / "csv")
    assert [record.captions for record in records] == [(Caption("hills"),), (Caption("a, b"),)]
    assert report.refused.counts == {"not_listed": 1}


@pytest.mark.parametrize(
    "names", [("1.JPG", "1.TXT"), ("1.jpg", "1.caption"), ("1.JPG", "1.txt"), ("1.jpg", "1.jpg.txt")]
)
def test_names_of_captions(tmp_path, names):
    put(tmp_path / "set", {f"10_hill/{names[0]}": b"x", f"10_hill/{names[1]}": "hills in spring"})
    assert read(tmp_path / "set")[0][0].captions == (Caption("hills in spring"),)


def test_two_caption_files_are_two_captions_and_equal_ones_are_one(tmp_path):
    put(tmp_path / "set", {"1.jpg": b"1", "1.caption": "tags", "1.txt": "hills", "2.jpg": b"2"})
    put(tmp_path / "set", {"2.txt": "hills", "2.caption": "hills"})
    assert [len(record.captions) for record in read(tmp_path / "set")[0]] == [2, 1]


def test_json_beside_a_caption(tmp_path):
    """As img2dataset, booru downloaders and labelme write it."""
    src = tmp_path / "web"
    put(src, {f"{n}.jpg": b"x" for n in range(5)} | {f"{n}.txt": f"hills {n}" for n in range(4)})
    put(src, {"0.json": json.dumps({"url": "x", "caption": "an alternative text", "tags": "sky", "licence": "CC0"})})
    put(src, {"1.json": "[1]", "2.json": json.dumps({"imageData": "x" * 2_000_000})})
    put(src, {"3.json": json.dumps({"captions": [{"text": "Hügel", "language": "de"}]})})
    put(src, {"4.json": json.dumps({"description": "hills", "url": "x"})})
    records, report = read(src)
    assert [record.captions for record in records[:3]] == [(Caption(f"hills {n}"),) for n in range(3)]
    assert records[0].tags == ("sky",) and records[0].licence == "CC0"
    assert records[3].captions == (Caption("hills 3"), Caption("Hügel", language="de"))
    assert report.lost.counts == {"bad_json": 2}
    assert report.refused.examples == {"missing_caption": ["4.jpg (keys 'description', 'url')"]}
    put(src, {"0.txt": " "})
    records = read(src, columns={"text": "description"})[0]
    assert records[0].captions == (Caption("an alternative text"),) and records[4].captions == (Caption("hills"),)


def test_hidden_folders_are_skipped(tmp_path):
    put(
        tmp_path / "set",
        {"1.jpg": b"1", "1.txt": "hills", "._1.jpg": b"mac", ".git/HEAD": "x", ".cache/x.parquet": b""},
    )
    for folder in (".thumbnails", ".ipynb_checkpoints", "__MACOSX", "a/@eaDir"):
        put(tmp_path / "set", {f"{folder}/1.jpg": b"small", f"{folder}/1.txt": "hills"})
    records, report = read(tmp_path / "set")
    assert keys(records) == ["1.jpg"] and report.refused.counts == {"hidden": 6}


def test_a_snapshot_of_the_hub_cache_links_to_its_own_blobs(tmp_path):
    cache = tmp_path / "datasets--me--hills"
    src = cache / "snapshots" / "0123abcd"
    put(cache / "blobs", {"aa": b"image", "bb": json.dumps({"file_name": "0.jpg", "text": "hills"}), "cc": table()})
    put(tmp_path, {"secret.jpg": b"secret"})
    (src / "data").mkdir(parents=True)
    for name, blob in (("0.jpg", "aa"), ("metadata.jsonl", "bb")):
        (src / name).symlink_to(f"../../blobs/{blob}")
    (src / "data" / "x.parquet").symlink_to("../../../blobs/cc")
    (src / "stolen.jpg").symlink_to(tmp_path / "secret.jpg")
    records, report = read(src)
    assert keys(records) == ["0.jpg", "data/x/00000000", "data/x/00000001"]
    assert report.refused.counts == {"not_listed": 1}
    assert keys(read(src / "metadata.jsonl")[0]) == ["0.jpg"]


def test_pointers_of_git_lfs_are_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    put(tmp_path / "set", {"1.jpg": pointer, "1.txt": "hills", "2.jpg": b"2", "2.txt": "hills"})
    records, report = read(tmp_path / "set")
    assert keys(records) == ["2.jpg"] and report.refused.counts == {"lfs_pointer": 1}


def test_unknown_keys_are_named_with_the_present_ones(tmp_path):
    lines = [json.dumps({"path": f"{n}.jpg", "description": f"hills {n}"}) for n in range(3)]
    put(tmp_path / "set", pictures() | {"metadata.jsonl": "\n".join(lines)})
    with pytest.raises(ValueError, match=r"unknown_keys, such as metadata.jsonl:1 \(keys 'path', 'description'\)"):
        read(tmp_path / "set")
    with pytest.raises(ValueError, match=r"lacks 'absent'; it has 'description', 'path'"):
        read(tmp_path / "set", columns={"image": "path", "text": "absent"})
    with pytest.raises(ValueError, match=r"unknown fields \['picture'\]; the fields are image, text"):
        read(tmp_path / "set", columns={"picture": "path"})
    records, report = read(tmp_path / "set", columns={"image": "path", "text": "description"})
    assert [record.captions[0].text for record in records] == ["hills 0", "hills 1", "hills 2"]
    assert not report.refused.total


def test_lines_of_one_image_are_captions_of_one_record(tmp_path):
    lines = [{"file_name": "0.jpg", "text": f"told in way {n % 5}", "tags": [f"tag {n}"]} for n in range(6)]
    edit = {"file_name": "1.jpg", "conditions": ["0.jpg"]}
    lines += [edit | {"instruction": "make it night"}, edit | {"instruction": "darken it"}]
    lines += [edit | {"conditions": ["2.jpg"], "instruction": "colour it"}, lines[0]]
    put(tmp_path / "set", pictures() | {"metadata.jsonl": "\n".join(map(json.dumps, lines))})
    records, report = read(tmp_path / "set")
    assert keys(records) == ["0.jpg", "1.jpg", "1.jpg#2"]
    assert [caption.text for caption in records[0].captions] == [f"told in way {n}" for n in range(5)]
    assert [caption.text for caption in records[1].captions] == ["make it night", "darken it"]
    assert records[2].conditions == (b"image 2",) and len(records[0].tags) == 6
    assert report.refused.counts == {"duplicate_key": 1}


def test_two_metadata_files_of_one_folder_are_merged(tmp_path):
    put(tmp_path / "set", pictures(2) | {"metadata.jsonl": "\n".join(LINES[:2])})
    put(tmp_path / "set", {"metadata.csv": "file_name,caption\n0.jpg,hills 0\n1.jpg,mountains\n"})
    records, report = read(tmp_path / "set")
    assert [[caption.text for caption in record.captions] for record in records] == [
        ["hills 0"],
        ["mountains", "hills 1"],
    ]
    assert report.refused.to_dict() == {"duplicate_key": {"count": 1, "examples": ["metadata.jsonl: 0.jpg"]}}


def test_consecutive_rows_of_one_image_are_captions_of_one_record(tmp_path):
    rows = [{"image": b"a" if n < 3 else b"b", "text": f"way {n}", "key": "a" if n < 3 else "b"} for n in range(5)]
    rows.append(rows[0])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    records, report = read(tmp_path / "x.parquet")
    assert [(record.key, len(record.captions)) for record in records] == [("x/a", 3), ("x/b", 2)]
    assert report.refused.counts == {"duplicate_key": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_files_are_read_by_their_byte_order_marks(tmp_path, encoding):
    text = "雪山\r\nin spring\u2028and more"
    put(tmp_path / "set", {"1.jpg": b"1", "1.txt": text.encode(encoding), "2.jpg": b"2"})
    put(tmp_path / "set", {"2.txt": "hills in spring".encode("utf-16-le")})
    lines = f"{LINES[0]}\r\n".replace("hills", "hills\u2028and ")
    put(tmp_path / "lines", pictures(1) | {"metadata.jsonl": lines.encode(encoding)})
    put(tmp_path / "csv", pictures(1) | {"metadata.csv": "file_name,text\r\n0.jpg,雪山\r\n".encode(encoding)})
    records, report = read(tmp_path / "set")
    assert records[0].captions == (Caption("雪山\nin spring\u2028and more"),)
    assert report.refused.to_dict() == {"not_utf8": {"count": 1, "examples": ["2.jpg"]}}
    assert read(tmp_path / "lines")[0][0].captions == (Caption("hills\u2028and  0"),)
    assert read(tmp_path / "csv")[0][0].captions == (Caption("雪山"),)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_from_macos_and_windows_find_their_files(tmp_path, forms):
    stored, written = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    for folder in ("plain", "listed/sub"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{stored}.jpg").write_bytes(b"x")
    (tmp_path / "plain" / f"{written}.txt").write_text("a street")
    row = {"file_name": f"sub\\{written}.jpg", "text": "a house"}
    (tmp_path / "listed" / "metadata.jsonl").write_text(json.dumps(row))
    report = ingest(tmp_path, tmp_path / "out", progress=False)
    keys = [record.key for record in RecordFolder(tmp_path / "out")]
    assert keys == [f"listed/sub/{stored}.jpg", f"plain/{stored}.jpg"] and not report.refused.total


def test_unusual_suffixes_of_sets_and_images_are_refused(tmp_path):
    names = ["a.txz", "a.tbz2", "a.tar.lz4", "a.tar.Z", "a.parq", "a.pq", "a.mds", "a.ndjson", "a.zip.001"]
    names += ["a.jxr", "a.j2c", "a.heics"]
    images = {"b.jpg_large": b"\xff\xd8\xff\xe0", "c": b"\x89PNG\r\n\x1a\n", "d.img": b"RIFF1234WEBPVP8 "}
    put(tmp_path, dict.fromkeys(names, b"x") | images | {"README": b"hills", "1.jpg": b"x", "1.txt": b"hills"})
    report = ingest(tmp_path, tmp_path / "out", progress=False)
    assert report.refused.counts == {"not_read": len(names) + len(images)}


def test_a_compressed_tar_and_names_with_dots_are_explained(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", "my.photo.jpg", "my.photo.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hills"))
    refused = ingest(tmp_path, tmp_path / "out", progress=False).refused
    assert refused.counts == {"not_read": 1, "missing_image": 1}
    assert "compressed" in refused.examples["not_read"][0] and "first dot" in refused.examples["missing_image"][0]


def test_tables_and_archives_that_are_not_read_are_warned_of_with_the_way_out(tmp_path, caplog):
    src = tmp_path / "mixed"
    files = {"meta.jsonl": "\n".join([*LINES, '{"file_name": "elsewhere.jpg", "text": "x"}', "{broken"])}
    files["below/list.csv"] = "file_name,text\n0.jpg,hills\n7.jpg,x\n"
    files["below/list.json"] = json.dumps([{"image_path": "0.jpg", "caption": "hills"}])
    files |= {"z.zip": "x", "t.tar.gz": "x", "prices.csv": "name,price\n0.jpg,3\n", "0.json": '{"width": 3}'}
    put(src, pictures() | {"below/0.jpg": b"below"} | files)
    records, report = read(src, without_captions=True)
    assert len(records) == 4 and report.refused.counts == {"not_read": 5}
    warnings = "\n".join(caplog.messages)
    assert "archives that are not read: 2, such as t.tar.gz; extract it, or repack it as a plain .tar" in warnings
    assert (
        "meta.jsonl is not read, but 3 of its 5 rows name images of this folder; rename it to metadata.jsonl"
        in warnings
    )
    assert "list.csv is not read, but 1 of its 2 rows" in warnings and "rename it to metadata.csv" in warnings
    assert "list.json is not read, but 1 of its 1 rows" in warnings
    assert "prices.csv" not in warnings and "0.json is" not in warnings
    (src / "meta.jsonl").rename(src / "metadata.jsonl")  # as the warning says
    captioned, _ = read(src)
    assert [record.captions[0].text for record in captioned] == ["hills 0", "hills 1", "hills 2"]


def test_a_folder_whose_tables_and_archives_are_read_gives_no_warning(tmp_path, caplog):
    put(tmp_path / "set", pictures() | {"metadata.jsonl": "\n".join(LINES), "set.tar": tar()})
    put(tmp_path / "set", {"stats.jsonl": '{"loss": 1}', "config.json": "{}", "odd.jsonl": '{"file_name": {"a": 1}}'})
    assert len(read(tmp_path / "set")[0]) == 4 and not caplog.messages
