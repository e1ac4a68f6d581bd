import os
import socket
import subprocess
import sys

import pytest

from qi2_jax.runtime.atomic import leftovers, write_atomic, write_json_atomic


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


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    """It may have been the first, into an empty folder; what other machines write is theirs."""
    path = tmp_path / "file"
    program = """
import os, sys, pathlib
from qi2_jax.runtime import atomic
os.fsync = lambda _: os.kill(os.getpid(), 9)
atomic.write_atomic(pathlib.Path(sys.argv[1]), b"half")
"""
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert leftovers(path) == [left]
    others = tmp_path / ".file.another.host-1.partial", tmp_path / f".file.{socket.gethostname()}-1.partial"
    for other in others:
        other.touch()
    write_atomic(path, b"whole")
    assert {*tmp_path.iterdir()} == {path, *others}
