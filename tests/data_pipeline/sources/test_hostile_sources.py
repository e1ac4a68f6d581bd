"""Malicious sources: usable samples are read, the rest is counted, and nothing else happens."""

import contextlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.records.shards import RecordFolder
from data_pipeline.sources import REASONS, Options, parquet
from data_pipeline.sources.ingest import ingest


def read(src: Path, out: Path, **options) -> tuple[list[str], dict[str, int]]:
    report = ingest(src, out, Options(**options), progress=False)
    assert set(report.refused.counts) <= set(REASONS)
    return [record.key for record in RecordFolder(out)], report.refused.counts


def tar_of(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg() and info.size == 0:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in (("png", b"image"), ("txt", b"a caption"))]
ROWS = pa.table({"image": [b"image"] * 40, "text": ["a caption"] * 40, "key": [f"k{i}" for i in range(40)]})


def parquet_of(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10)
    return buffer.getvalue()


SOURCES = {
    "x.tar": tar_of(GOOD),
    "x.parquet": parquet_of(ROWS),
    "x.jsonl": b"\n".join(json.dumps({"file_name": f"{i}.png", "text": "a caption"}).encode() for i in range(3)),
}
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=60, deadline=None)
@given(damage=DAMAGE, length=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_damaged_bytes_are_refused_and_never_more(name, damage, length):
    data = bytearray(SOURCES[name])
    for place, byte in damage:
        data[int(place * len(data))] = byte
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "set", name)
        source.parent.mkdir()
        for i in range(3):
            (source.parent / f"{i}.png").write_bytes(b"image")
        source.write_bytes(bytes(data[: int(length * len(data))]))
        with contextlib.suppress(ValueError):  # nothing usable, or no column of images
            keys, _ = read(source, Path(folder, "out"))
            assert len(keys) == len(set(keys)) <= 40
        assert {path.name for path in Path(folder).iterdir()} <= {"set", "out"}


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
)
def test_members_that_are_not_files(tmp_path, kind):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    members = [*GOOD, (special("bad.png", kind, str(secret)), b""), ("bad.txt", b"a caption")]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    keys, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert keys[:3] == ["x/0", "x/1", "x/2"]
    assert all(record.image != b"secret" for record in RecordFolder(tmp_path / "out"))
    assert refused == ({} if kind == tarfile.CONTTYPE else {"not_a_file": 1})


def header(name: str, size: bytes) -> bytes:
    """A member's header with the given size and a valid checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"not a size!!", b"\0" * 12],
    ids=["8 GB", "2**95", "negative", "text", "none"],
)
def test_sizes_that_are_absurd(tmp_path, size):
    good = tar_of(GOOD)[: 512 * 12]
    (tmp_path / "x.tar").write_bytes(good + header("bad.png", size) + b"\0" * 512 + good.replace(b"0.", b"9."))
    keys, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert keys[:3] == ["x/0", "x/1", "x/2"] and len(keys) <= 4
    assert sum(refused.values()) >= 1 or size == b"\0" * 12


def test_a_crowd_of_members_and_names_without_end(tmp_path):
    crowd = [(f"crowd.{i}.bin", b"") for i in range(500)] + [("crowd.png", b"image"), ("crowd.txt", b"a caption")]
    names = [("n" * 3000 + ".png", b"image"), ("n" * 3000 + ".txt", b"a caption"), ("\udcff.png", b"image")]
    (tmp_path / "x.tar").write_bytes(tar_of([*GOOD, *crowd, *names]))
    keys, refused = read(tmp_path / "x.tar", tmp_path / "out")
    assert keys == ["x/0", "x/1", "x/2"]
    assert refused["bad_name"] == 3 and refused["missing_image"] == 1


def test_captions_of_a_megabyte(tmp_path):
    long = "x" * 1_000_000
    (tmp_path / "a.tar").write_bytes(tar_of([*GOOD, ("bad.png", b"i"), ("bad.txt", long.encode())]))
    assert read(tmp_path / "a.tar", tmp_path / "a")[1] == {"caption_too_long": 1}
    rows = pa.table({"image": [b"i", b"i"], "text": ["a caption", long]})
    (tmp_path / "b.parquet").write_bytes(parquet_of(rows))
    assert read(tmp_path / "b.parquet", tmp_path / "b")[1] == {"caption_too_long": 1}


def test_equal_names_in_several_files_stay_apart(tmp_path):
    for kind, data in (("tar", SOURCES["x.tar"]), ("parquet", SOURCES["x.parquet"])):
        (tmp_path / kind).mkdir()
        for name in ("a", "b"):
            (tmp_path / kind / f"{name}.{kind}").write_bytes(data)
        keys, refused = read(tmp_path / kind, tmp_path / f"{kind}-out")
        assert len(keys) == len(set(keys)) == (6 if kind == "tar" else 80) and refused == {}
        assert {key.split("/")[0] for key in keys} == {"a", "b"}


@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_table_that_is_cut_off_or_damaged_inside(tmp_path, share):
    whole = SOURCES["x.parquet"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.parquet").write_bytes(whole)
    (tmp_path / "t" / "b.parquet").write_bytes(whole[: int(len(whole) * share)])
    middle = len(whole) // 2
    (tmp_path / "t" / "c.parquet").write_bytes(whole[: middle - 200] + b"\xff" * 200 + whole[middle:])
    keys, refused = read(tmp_path / "t", tmp_path / "out")
    assert len([key for key in keys if key.startswith("a/")]) == 40
    assert not [key for key in keys if key.startswith("b/")] and refused["broken_file"] >= 1


def test_columns_of_other_types_are_counted(tmp_path):
    table = pa.table({"image": ["text"] * 3 + [None], "text": [1.5] * 4, "tags": [[None]] * 4})
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.parquet").write_bytes(SOURCES["x.parquet"])
    (tmp_path / "t" / "b.parquet").write_bytes(parquet_of(table))
    keys, refused = read(tmp_path / "t", tmp_path / "out")
    assert len(keys) == 40 and refused == {"missing_image": 4}


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"text": pa.array([b"\xff\xfe", b"fine"]).view(pa.string())}, "not_utf8"),
        ({"key": pa.array([2**62, 0]).cast(pa.timestamp("us"))}, "bad_metadata"),
        ({"key": pa.array([2**62 + 1, 0]).cast(pa.timestamp("ns"))}, "bad_metadata"),
        ({"tags": pa.array([[None] * 100_000, ["a tag"]])}, "bad_metadata"),
        ({"tags": pa.array([{"x": [[None] * 100_000]}, None])}, "bad_metadata"),
        ({"licence": pa.array([[("a", None)] * 100_000, None], pa.map_(pa.string(), pa.int8()))}, "bad_metadata"),
    ],
)
def test_a_value_that_cannot_be_converted_loses_only_its_row(tmp_path, column, reason):
    table = pa.table({"image": [b"image"] * 2, "text": ["a caption"] * 2} | column)
    (tmp_path / "x.parquet").write_bytes(parquet_of(table))
    keys, refused = read(tmp_path / "x.parquet", tmp_path / "out")
    assert len(keys) == 1 and refused == {reason: 1}


def test_a_column_of_millions_of_nulls_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_GROUP_VALUES", 50)
    tags = [["a tag"]] * 10 + [[None] * 51] + [None] * 9 + [["a tag"]] * 20
    table = ROWS.append_column("tags", pa.array(tags)).append_column("embedding", pa.array([[0.5] * 51] * 40))
    (tmp_path / "x.parquet").write_bytes(parquet_of(table))
    keys, refused = read(tmp_path / "x.parquet", tmp_path / "out")
    assert keys == [f"x/k{i}" for i in range(40) if not 10 <= i < 20] and refused == {"broken_file": 1}
