import json
import subprocess
import sys
from dataclasses import replace

import pytest

from data_pipeline.filters import CASCADE
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import RecordFolder, write_shards
from data_pipeline.scoring import cascade
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection.select import select


@pytest.fixture
def folder(tmp_path, picture, encoded):
    """Seven records in three shards; the fourth does not decode."""
    images = [encoded(picture(seed, size=(60, 40))) if seed != 3 else b"broken" for seed in range(7)]
    records = [Record(f"{i}.png", image, (Caption("x"),), "test") for i, image in enumerate(images)]
    write_shards(tmp_path, records, records_per_shard=3)
    return tmp_path


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "scores").rglob("*")) if p.is_file()}


def test_scores_are_one_row_per_record_in_order(folder):
    names = [f.name for f in CASCADE if f.can_score]
    assert score(folder, workers=1, progress=False).scored == dict.fromkeys(names, 7)
    rows = list(read_scores(folder, CASCADE))
    assert [row["key"] for row in rows] == [record.key for record in RecordFolder(folder)]
    assert {*rows[0]} == {"key"} | {f"{f.name}.{column}" for f in CASCADE for column in f.columns}
    assert rows[3]["broken.reason"] == "unknown_format"
    assert rows[3]["broken.bytes"] == 6
    assert rows[3]["resolution.width"] is None
    assert [row["resolution.width"] for row in rows if row["broken.reason"] is None] == [60] * 6


def test_workers_do_not_change_a_byte(demo, tmp_path):
    results = []
    for workers in (1, 2):
        link = tmp_path / str(workers)
        link.mkdir()
        for path in demo[2].iterdir():
            if path.is_file():
                (link / path.name).symlink_to(path)
        score(link, workers=workers, progress=False)
        results.append(files(link))
    assert results[0] == results[1]


def test_killed_run_continues_with_what_is_missing(folder, monkeypatch):
    score(folder, workers=1, progress=False)
    complete = files(folder)
    names = [shard.file.removesuffix(".arrayrecord") for shard in RecordFolder(folder).shards]
    (folder / f"scores/resolution/{names[0]}.parquet").unlink()
    (folder / f"scores/resolution/{names[1]}.done.json").unlink()
    (folder / f"scores/duplicates/{names[2]}.done.json").write_text("{")
    with pytest.raises(ValueError, match=r"'resolution' version 1 has not scored 2 of 3 shards; run `qi2 data score"):
        select(folder)
    report = score(folder, workers=1, progress=False)
    assert report.scored == dict.fromkeys(report.scored, 0) | {"resolution": 6, "duplicates": 1}
    assert files(folder) == complete
    monkeypatch.setattr(cascade, "decode_image", None)  # a complete folder is not decoded again
    assert set(score(folder, workers=1, progress=False).scored.values()) == {0}


def test_interruption_within_a_shard_keeps_the_shards_before(folder, monkeypatch):
    decode, count = cascade.decode_image, 0

    def dies(data, **options):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return decode(data, **options)

    monkeypatch.setattr(cascade, "decode_image", dies)
    with pytest.raises(KeyboardInterrupt):
        score(folder, workers=1, progress=False)
    assert not [name for name in files(folder) if "partial" in name]
    monkeypatch.setattr(cascade, "decode_image", decode)
    assert set(score(folder, workers=1, progress=False).scored.values()) == {4}


def test_new_version_of_a_filter_rescans_only_this_filter(folder):
    score(folder, workers=1, progress=False)
    before = files(folder)
    newer = tuple(replace(f, version=2) if f.name == "resolution" else f for f in CASCADE)
    report = score(folder, filters=newer, workers=1, progress=False)
    assert report.scored == dict.fromkeys(report.scored, 0) | {"resolution": 7}
    changed = {name for name, content in files(folder).items() if before[name] != content}
    assert changed == {name for name in before if name.startswith("scores/resolution/") and name.endswith("done.json")}


def test_scores_of_other_records_do_not_count(folder):
    score(folder, workers=1, progress=False)
    records = list(RecordFolder(folder))
    (folder / "manifest.json").unlink()
    write_shards(folder, [*records[:6], replace(records[6], image=b"other")], records_per_shard=3)
    assert score(folder, workers=1, progress=False).scored["broken"] == 1


def test_damaged_scores_are_named(folder):
    score(folder, workers=1, progress=False)
    path = folder / "scores/broken/records-00001-of-00003.parquet"
    for damaged in (path.read_bytes()[:-1], path.with_name("records-00002-of-00003.parquet").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            list(read_scores(folder, CASCADE))


def test_a_changed_bit_of_a_table_is_noticed(folder):
    score(folder, workers=1, progress=False)
    path = folder / "scores/broken/records-00001-of-00003.parquet"
    data = path.read_bytes()
    marker = path.with_name(path.name.replace(".parquet", ".done.json"))
    rows = list(read_scores(folder, CASCADE))
    for position in range(4, len(data) - 8, 97):
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        with pytest.raises(ValueError, match=path.name):
            list(read_scores(folder, CASCADE))
    path.write_bytes(data)
    before = json.loads(marker.read_text())
    del before["table"]  # as earlier versions wrote it
    marker.write_text(json.dumps(before))
    assert list(read_scores(folder, CASCADE)) == rows
    assert not any(score(folder, workers=1, progress=False).scored.values())


def test_other_weights_behind_a_filter_rescan_only_this_filter(folder):
    score(folder, workers=1, progress=False)
    other = tuple(replace(f, model="a digest") if f.name == "resolution" else f for f in CASCADE)
    assert score(folder, filters=other, workers=1, progress=False).scored["resolution"] == 7
    assert set(score(folder, filters=other, workers=1, progress=False).scored.values()) == {0}


def test_large_images_make_small_batches(folder, monkeypatch):
    records = list(RecordFolder(folder))
    assert [len(batch) for batch in cascade._batches(records)] == [7]
    monkeypatch.setattr(cascade, "BATCH_PIXELS", 2 * 60 * 40)
    assert [len(batch) for batch in cascade._batches(records)] == [2, 3, 2]


def test_worker_processes_start_light_and_the_calling_script_needs_its_guard(folder):
    program = "import sys, data_pipeline.scoring.cascade; print(sorted({'jax', 'torch', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    program = f"from data_pipeline.scoring.cascade import score; score({str(folder)!r}, workers=2, progress=False)"
    done = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True)
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_workers_must_be_positive(folder):
    with pytest.raises(ValueError, match="workers is 0"):
        score(folder, workers=0)


def test_the_images_of_a_record_share_the_limit_of_pixels(tmp_path, picture, encoded, monkeypatch):
    image, one = encoded(picture(size=(60, 40))), encoded(picture(size=(1, 1)))
    monkeypatch.setattr(cascade, "MAX_RECORD_PIXELS", 3 * 60 * 40)
    sources = [(image,) * 2, (image,) * 2 + (one, b"never read"), (image,)]
    edits = [Record(f"{i}", image, (Caption("x", "instruction"),), "test", None, s) for i, s in enumerate(sources)]
    write_shards(tmp_path, edits, records_per_shard=3)
    score(tmp_path, workers=1, progress=False)
    rows = list(read_scores(tmp_path, CASCADE))
    assert [row["broken.reason"] for row in rows] == [None, "too_many_pixels", None]
    assert rows[1]["broken.detail"] == "condition image 2: 1 x 1 of 0 allowed"
