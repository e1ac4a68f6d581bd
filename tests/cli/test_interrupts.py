"""Ctrl-C on commands: one line, status 130, and no half-written output. Real processes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from qi2_jax.training.checkpoints import files
from tests.training import runs_of

ROOT = pathlib.Path(__file__).parents[2]
SLOW = """
import importlib, sys, time
def wait(*arguments, **options):
    print("waits", file=sys.__stdout__, flush=True)
    time.sleep(60)
*path, name = {target!r}.split(".")
module = importlib.import_module(path[0])
for part in path[1:]:
    if not hasattr(module, part):
        importlib.import_module(f"{{module.__name__}}.{{part}}")
    module = getattr(module, part)
setattr(module, name, wait)
from qi2_jax.cli import main
main.main()
"""


def interrupted(target: str, *arguments: str, number: int = signal.SIGINT) -> subprocess.CompletedProcess:
    """Runs a command that receives a signal when it calls the function `target`."""
    command = [sys.executable, "-c", SLOW.format(target=target), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        printed = ""
        while "waits" not in printed:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            printed += line
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, printed + out, err)


def messages(done: subprocess.CompletedProcess) -> list[str]:
    """What a user sees, without progress and without the hint of a shutdown that takes more than two seconds."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    return [line for line in lines if ("SIG" in line and "finishing" not in line) or "Traceback" in line]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_import_removes_its_folder(number, status, published, tmp_path):
    out = tmp_path / "out"
    done = interrupted("qi2_jax.interop.folder._copy", "import", str(published), "--out", str(out), number=number)
    assert (done.returncode, messages(done)) == (status, [f"{number.name}: stopped"]), done.stderr
    assert not out.exists()


def test_an_interrupted_export_removes_its_folder(imported, tmp_path):
    out = tmp_path / "out"
    done = interrupted("qi2_jax.interop.folder._copy", "export", str(imported), "--out", str(out))
    assert (done.returncode, messages(done)) == (130, ["SIGINT: stopped"]), done.stderr
    assert not out.exists()


def test_an_interrupted_image_is_absent_and_not_half_written(imported, tmp_path):
    out = tmp_path / "image.png"
    arguments = ["--prompt", "a fox", "--out", str(out), "--size", "64x64", "--steps", "1"]
    done = interrupted("os.fsync", "sample", str(imported), *arguments)
    assert (done.returncode, messages(done)) == (130, ["SIGINT: stopped"]), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["report", "checkpoints", "data"])
def test_ctrl_c_while_libraries_are_imported_shows_no_traceback(verb):
    done = interrupted("argparse.ArgumentParser.parse_known_args", verb)
    assert (done.returncode, done.stderr) == (130, "SIGINT: stopped\n")


@pytest.mark.parametrize("step", ["score", "cache"])
def test_a_step_of_data_that_resumes_says_so_and_is_no_failure_after_sigterm(step):
    target = "argparse.ArgumentParser.parse_known_args"
    done = interrupted(target, "data", step, "records", number=signal.SIGTERM)
    assert (done.returncode, done.stderr) == (0, "SIGTERM: stopped; run again to continue\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_and_a_closed_terminal_save_the_training(number, status, tmp_path):
    runs_of.write_model(tmp_path / "model")
    runs_of.write_samples(tmp_path / "samples", tmp_path / "model")
    runs_of.finish_model(tmp_path / "samples", tmp_path / "model")
    out = tmp_path / "run"
    process = runs_of.start(tmp_path, out, "transformer.checkpoint.every=1000", "transformer.train.steps=500")
    process.wait_until(lambda: max(runs_of.logged(out), default=0) >= 1)
    process.signal(number)
    done = process.done(120)
    assert done.status == status and "Traceback" not in done.text, done.text[-3000:]
    (saved,) = files.steps(out / "checkpoints")
    assert saved == max(runs_of.logged(out)) < 500
