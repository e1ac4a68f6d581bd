"""Checkpoints of real processes: killed at any moment, on a full disk, several that save and restore together."""

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from qi2_jax.training.checkpoints import checksums, files
from tests.training import runs_of

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = [sys.executable, str(pathlib.Path(__file__).with_name("checkpoint_program.py"))]


def flip_one_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def overwrite(path: pathlib.Path) -> None:
    """Other contents of the same size, which nothing can read."""
    path.write_bytes(b"x" * path.stat().st_size)


def run(directory: pathlib.Path, action: str, *rest: str, **options) -> subprocess.CompletedProcess:
    command = [*PROGRAM, str(directory), action, *rest]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300, **options)


def started(directory: pathlib.Path, action: str, *rest: str) -> subprocess.Popen:
    command = [*PROGRAM, str(directory), action, *rest]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def test_kills_at_any_moment_of_saving_leave_only_whole_checkpoints(tmp_path):
    rng, reached = random.Random(0), 0
    for _ in range(4):
        process = started(tmp_path, "loop")
        begun = 0
        for line in process.stdout:
            if line.startswith("restored"):
                assert int(line.split()[1]) >= reached
            if line.startswith("began"):
                begun = int(line.split()[1])
                if begun > reached + 2:
                    break
            assert "damaged" not in line, line
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = max(files.steps(tmp_path))
        assert reached >= begun - 2
        assert not any(checksums.problems(tmp_path / str(step)) for step in files.steps(tmp_path))
    done = run(tmp_path, "once")
    assert done.returncode == 0 and f"restored {reached}" in done.stdout, done.stderr[-2000:]
    assert {path.suffix for path in tmp_path.iterdir()} == {""}  # nothing is left of what was killed


def test_kills_during_a_restore_lose_nothing(tmp_path):
    assert run(tmp_path, "once").returncode == run(tmp_path, "once").returncode == 0
    flip_one_bit(max(tmp_path.glob("2/model/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size))
    for pause in (0.0, 0.05, 0.2):
        process = started(tmp_path, "restore")
        assert "restoring\n" in iter(process.stdout.readline, "")
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = run(tmp_path, "once")
    assert "restored 1" in done.stdout and files.steps(tmp_path) == [1, 2]
    assert files.damaged(tmp_path) == ["2.damaged"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_full_disk_fails_the_save_and_the_same_command_goes_on_later(tmp_path):
    """On a real file system of 40 MiB, mounted in a namespace of its own, which needs no root."""
    if not can_mount():
        pytest.skip("needs `unshare -Urm` and tmpfs")
    program = " ".join(PROGRAM)
    script = f"""
        mount -t tmpfs -o size=40m none {tmp_path}
        {program} {tmp_path}/run once && echo first
        dd if=/dev/zero of={tmp_path}/ballast bs=64k status=none
        truncate -s -1M {tmp_path}/ballast
        {program} {tmp_path}/run once || echo refused
        ls {tmp_path}/run
        rm {tmp_path}/ballast
        {program} {tmp_path}/run once && echo freed
        ls {tmp_path}/run
    """
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    lines = done.stdout.split("\n")
    assert lines == [
        *("restoring", "restored 0", "began 1", "closed", "first"),
        *("restoring", "restored 1", "began 2", "refused", "1"),
        *("restoring", "restored 1", "began 2", "closed", "freed", "1", "2", ""),
    ], done.stderr
    assert f"ValueError: saving step 2 in {tmp_path}/run failed: " in done.stderr
    assert "No space left on device" in done.stderr and "GiB are free there. Earlier checkpoints [1]" in done.stderr


def together(directory: pathlib.Path, action: str) -> list[str]:
    port = runs_of.free_port()
    running = [started(directory, action, str(process), "2", port) for process in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(printed)[-4000:]
    return printed


def test_two_processes_share_the_checksums_and_choose_the_same_checkpoint(tmp_path):
    for printed in together(tmp_path, "once") + together(tmp_path, "once"):
        assert "closed" in printed
    shares = [json.loads((tmp_path / "2" / f"checksums-{process}.json").read_text()) for process in range(2)]
    names = [set(share["files"]) for share in shares]
    assert names[0] and names[1] and not names[0] & names[1]
    assert names[0] | names[1] | {"checksums-0.json", "checksums-1.json"} == files.files(tmp_path / "2").keys()

    # Both of those that process 1 verifies when two restore: an array, and what both would read before any array.
    array, inside = (next(name for name in sorted(names[1]) if part in name) for part in ("/d/", "/_METADATA"))
    flip_one_bit(tmp_path / "2" / array)
    overwrite(tmp_path / "2" / inside)
    for printed in together(tmp_path, "restore"):
        assert "restored 1" in printed
        assert all(f"{name} has other contents" in printed for name in (array, inside))
    assert files.steps(tmp_path) == [1] and files.damaged(tmp_path) == ["2.damaged"]
    assert "restored 1" in run(tmp_path, "once").stdout  # one process goes on where two were
