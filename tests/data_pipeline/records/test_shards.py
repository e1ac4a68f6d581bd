import json
import os
import pickle

import pytest

from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import MANIFEST, RecordFolder, read_manifest, write_shards

RECORDS = [Record(f"{i:02d}", bytes([i]) * i, (Caption(f"picture {i}"),), "set") for i in range(7)]


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "out", iter(RECORDS), records_per_shard=3)
    return tmp_path / "out"


def test_round_trip_and_random_access(folder):
    records = RecordFolder(folder)
    assert [shard.records for shard in records.shards] == [3, 3, 1]
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST] + [
        f"records-0000{i}-of-00003.arrayrecord" for i in range(3)
    ]
    assert list(records) == RECORDS
    assert [records[i] for i in (6, 0, 3, 2)] == [RECORDS[i] for i in (6, 0, 3, 2)]
    assert pickle.loads(pickle.dumps(records))[4] == RECORDS[4]
    for index in (-1, 7):
        with pytest.raises(IndexError):
            records[index]


def test_digest_follows_the_content(folder, tmp_path):
    changed = [*RECORDS[:4], Record("04", b"other", RECORDS[4].captions, "set"), *RECORDS[5:]]
    other = write_shards(tmp_path / "changed", changed, records_per_shard=3)
    same = [a.digest == b.digest for a, b in zip(read_manifest(folder), other, strict=True)]
    assert same == [True, False, True]


def test_killed_run_does_not_count_as_complete(tmp_path):
    def dies():
        yield from RECORDS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, dies(), records_per_shard=2)
    with pytest.raises(ValueError, match="interrupted"):
        read_manifest(tmp_path)
    write_shards(tmp_path, RECORDS, records_per_shard=4)
    assert list(RecordFolder(tmp_path)) == RECORDS
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_writer_is_refused_and_names_the_first(tmp_path):
    def records():
        yield RECORDS[0]
        with pytest.raises(ValueError, match=rf"another process works in .*out \(process {os.getpid()} of"):
            write_shards(tmp_path / "out", RECORDS[3:], records_per_shard=2)
        yield from RECORDS[1:]

    write_shards(tmp_path / "out", records(), records_per_shard=2)
    assert list(RecordFolder(tmp_path / "out")) == RECORDS
    assert not (tmp_path / "out" / ".lock").exists()


def test_records_of_another_run_do_not_match_the_manifest(folder, tmp_path):
    other = [Record(f"{i:02d}", b"other", (Caption(f"picture {i}"),), "other") for i in range(7)]
    write_shards(tmp_path / "other", other, records_per_shard=3)
    name = "records-00001-of-00003.arrayrecord"
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=rf"{name}: its records do not match manifest.json"):
        list(RecordFolder(folder))


def test_complete_folder_is_never_overwritten(folder):
    with pytest.raises(ValueError, match="already contains records"):
        write_shards(folder, RECORDS, records_per_shard=3)
    assert list(RecordFolder(folder)) == RECORDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"schema": 9}, "schema 9"),
        (lambda m: {"schema": 1}, "not a manifest"),
        (lambda m: [], "not a manifest"),
        (lambda m: m | {"shards": [m["shards"][0] | {"file": "../../etc/passwd"}]}, "names shards"),
        (lambda m: m | {"shards": [m["shards"][0] | {"records": 0}]}, "names shards"),
        (lambda m: m | {"shards": [m["shards"][0] | {"records": "3"}]}, "manifest"),
    ],
)
def test_malformed_manifest(folder, change, message):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change(manifest)))
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_damaged_shards_are_named(folder):
    first, second, third = sorted(folder.glob("*.arrayrecord"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(third.read_bytes())
    third.unlink()
    records = RecordFolder(folder)
    for index, path in ((0, first), (3, second), (6, third)):
        with pytest.raises(ValueError, match=path.name):
            records[index]
