import os

import pytest

from data_pipeline.atomic import write_atomic, write_json_atomic


def test_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def dies(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new, and longer")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "file", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
