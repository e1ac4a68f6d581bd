"""Folders that imports and exports write: complete, or not there; never in the folder that is read."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from qi2_jax.interop import components, files, folder, tensors

CALLS = {"import": (folder.import_folder, folder.MARK), "export": (folder.export_folder, folder.INDEX)}


@pytest.fixture
def sources(published, imported):
    return {"import": published, "export": imported}


def fail_at(monkeypatch, count: int, error: BaseException) -> None:
    """Makes the `count`-th write of a tensor fail."""
    calls, write = [], tensors.Writer.write

    def failing(self, name, *args):
        calls.append(name)
        if len(calls) == count:
            raise error
        return write(self, name, *args)

    monkeypatch.setattr(tensors.Writer, "write", failing)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl_c"])
def test_a_failure_leaves_nothing(sources, tmp_path, monkeypatch, call, error, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail_at(patch, 100, error)
        CALLS[call][0](sources[call], out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * exists
    CALLS[call][0](sources[call], out)
    assert (out / CALLS[call][1]).is_file() and not (out / files.STAGING).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_leaves_nothing_under_the_names_of_a_complete_folder(sources, tmp_path, monkeypatch, call, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        fail_at(patch, 100, RuntimeError("killed"))
        patch.setattr(shutil, "rmtree", lambda path, **_: None)  # a killed process cleans nothing up
        CALLS[call][0](sources[call], out)
    (staging,) = out.iterdir() if exists else tmp_path.iterdir()
    assert staging.name.endswith(files.STAGING) and (staging / "transformer").is_dir()
    assert out.exists() is exists
    (staging / "transformer" / "left_over.json").write_text("{}")
    if exists:  # killed while the finished files were moved
        (out / "vae").mkdir()
        (out / "vae" / "left_over.json").write_text("{}")
    CALLS[call][0](sources[call], out)
    assert (out / CALLS[call][1]).is_file() and not list(tmp_path.rglob("left_over.json"))
    assert not list(tmp_path.rglob(f"*{files.STAGING}"))


def test_what_an_earlier_version_left_of_a_killed_import_is_named_and_not_deleted(published, tmp_path):
    out = tmp_path / "out"
    (out / "vae").mkdir(parents=True)
    (out / files.UNFINISHED).write_text("")
    with pytest.raises(ValueError, match=r"is incomplete: an earlier version .* Delete the folder \(rm -r .*out\)"):
        folder.import_folder(published, out)
    assert (out / files.UNFINISHED).exists() and (out / "vae").is_dir()


@pytest.mark.parametrize("call", CALLS)
def test_the_file_that_makes_a_folder_complete_is_written_last(sources, tmp_path, monkeypatch, call):
    out, order = tmp_path / "out", []
    write, exit_ = files.write, tensors.Writer.__exit__
    monkeypatch.setattr(files, "write", lambda path, data: (order.append(path), write(path, data))[1])
    monkeypatch.setattr(
        tensors.Writer, "__exit__", lambda self, *error: (order.append(self.path), exit_(self, *error))[1]
    )
    CALLS[call][0](sources[call], out)
    staging = tmp_path / f".out{files.STAGING}"
    assert order[-1] == staging / CALLS[call][1]
    assert {path.relative_to(staging).parts[0] for path in order} >= {*components.COMPONENTS, *folder.AUXILIARY}


def test_two_writers_of_one_folder(published, tmp_path):
    out = tmp_path / "out"
    with files.building(out, 0) as place:
        (place / "a").write_text("")
        with pytest.raises(ValueError, match=r"another process is writing .*out"), files.building(out, 0):
            pass
        assert (place / "a").is_file()
    assert [path.name for path in out.iterdir()] == ["a"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["sub", "a/b", "vae/export"])
def test_nothing_is_written_into_the_folder_that_is_read(sources, tmp_path, call, name):
    source, link = tmp_path / "source", tmp_path / "link"
    shutil.copytree(sources[call], source, copy_function=os.link)
    link.symlink_to(source)
    before = sorted(source.rglob("*"))
    for out in (source / name, link / name, tmp_path / "other" / ".." / "source" / name):
        with pytest.raises(ValueError, match=r"lies in .*source, which is only read"):
            CALLS[call][0](source, out)
        with pytest.raises(ValueError, match=r"lies in .*link, which is only read"):
            CALLS[call][0](link, out)
    assert sorted(source.rglob("*")) == before
    CALLS[call][0](source, tmp_path / "source_2")  # a name that only begins alike


SLOW = """
import sys, time
from qi2_jax.cli.main import main
from qi2_jax.interop import tensors

write = tensors.Writer.write
def write_and_wait(self, *args):
    write(self, *args)
    print("writing", file=sys.stderr, flush=True)
    time.sleep(60)  # until the signal
tensors.Writer.write = write_and_wait
sys.argv = ["qi2", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_nothing_half_written(sources, tmp_path, call, number):
    """With a real process, in the middle of writing."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, call, str(sources[call]), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stderr is not None
    for line in process.stderr:
        if "writing" in line:
            break
    assert not out.exists() and (tmp_path / f".out{files.STAGING}").is_dir()
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(60) != 0
    assert not out.exists()
    if number == signal.SIGINT:
        assert not list(tmp_path.iterdir())


KILLED = """
import os, pathlib, sys
from qi2_jax.interop import files
with files.building(pathlib.Path(sys.argv[1]), 0):
    os._exit(9)
"""


def test_a_killed_process_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == 9 and not out.exists()
    with files.building(out, 0):
        pass
    assert out.is_dir()
