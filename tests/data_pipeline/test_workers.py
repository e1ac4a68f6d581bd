"""Worker processes on Ctrl-C: a separate session simulates the terminal, which signals all of its processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, pathlib, sys, time
from data_pipeline import workers
from qi2_jax.runtime import signals

OUT = pathlib.Path(sys.argv[1])
if __name__ != "__main__" and sys.argv[2] == "imports":  # a worker, before any code of the pool
    (OUT / f"{os.getpid()}.importing").touch()
    time.sleep(60)

def make(number):
    partial = OUT / f"{number}.partial"
    partial.touch()
    try:
        time.sleep(60)
    finally:
        partial.unlink()

if __name__ == "__main__":
    signals.listen(interruptible=True)
    with signals.ending():
        print("starts", flush=True)
        list(workers.in_order(make, 100, 2, "testing"))
"""


def start(tmp_path: pathlib.Path, moment: str) -> subprocess.Popen:
    """Starts the program and waits until two workers import or two tasks run; both last longer than the test."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "out", moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    assert process.stdout.readline() == "starts\n"
    end = time.monotonic() + 60
    while len(list((tmp_path / "out").iterdir())) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("moment", ["imports", "tasks"])
def test_ctrl_c_ends_the_pool_quietly_and_tasks_remove_their_partial_files(moment, tmp_path):
    process = start(tmp_path, moment)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "finishing the work" not in line]
    assert (process.returncode, lines) == (130, ["SIGINT: stopped; run again to continue"]), err
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_worker_that_is_killed_is_an_error_that_names_the_work(tmp_path):
    process = start(tmp_path, "tasks")
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(int(pid) for pid in children if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "a process for testing died. Finished work is kept" in err
