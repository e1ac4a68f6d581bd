"""The start script of the image: signals, statuses, and four processes of which one is killed."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from qi2_jax.launching.environment import STOPPED
from qi2_jax.runtime.signals import STOPPED_STATUS
from tests.launching import training_program
from tests.training import runs_of, toy
from tests.training.runs_of import Started, logged

START = runs_of.ROOT / "launch" / "start.sh"
STEPS, KILLED_AT, KILLED = 9, 5, 2  # steps of the run, step after which a process is killed, and its number


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if key != STOPPED_STATUS} | (environment or {})
    return subprocess.run([START, *arguments], capture_output=True, text=True, check=False, timeout=60, env=given)


def counting(folder: pathlib.Path, *statuses: int) -> list[str]:
    """A command that exits with these statuses, one after the other; it writes how often it ran."""
    program = (
        "import pathlib, sys; runs = pathlib.Path(sys.argv[1]); count = len(runs.read_text()) if runs.exists() else 0; "
        "runs.write_text('x' * (count + 1)); sys.exit(int(sys.argv[2 + min(count, len(sys.argv) - 3)]))"
    )
    return [sys.executable, "-S", "-c", program, str(folder / "runs"), *map(str, statuses)]


@pytest.mark.parametrize(
    ("restarts", "statuses", "status", "runs"),
    [
        (3, (0,), 0, 1),  # finished
        (0, (1,), 1, 1),  # the cluster restarts
        (0, (STOPPED,), STOPPED, 1),
        (3, (1, 70, 0), 0, 3),
        (2, (1,), 1, 3),  # no restart is left
        (1, (1, STOPPED, STOPPED, 0), 0, 4),  # stopped by another host: does not count
        (3, (2,), 2, 1),  # a mistake in the command stays one
    ],
)
def test_the_status_decides_whether_the_command_starts_again(restarts, statuses, status, runs, tmp_path):
    done = run("--restarts", str(restarts), "--wait", "0", "--", *counting(tmp_path, *statuses))
    assert (done.returncode, len((tmp_path / "runs").read_text())) == (status, runs), done.stderr


@pytest.mark.parametrize("arguments", [(), ("--",), ("--restarts", "many", "--", "true"), ("--restarts",), ("true",)])
def test_wrong_arguments_are_named(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "usage: start.sh" in done.stderr


def started(*arguments: str, environment: dict[str, str] | None = None) -> Started:
    """The script in the background, with its output in a file."""
    given = [f"{key}={value}" for key, value in (environment or {}).items()]
    return Started(["env", "--unset", STOPPED_STATUS, *given, str(START), *arguments])


def test_sigterm_reaches_the_command_and_is_not_followed_by_a_restart():
    program = (
        "import os, signal, sys, time\n"
        f"def stop(*_): print('saved'); sys.exit(int(os.environ['{STOPPED_STATUS}']))\n"
        "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(60)"
    )
    script = started("--restarts", "5", "--wait", "0", "--", sys.executable, "-S", "-c", program)
    script.wait_until(lambda: "ready" in script.printed())
    script.signal(signal.SIGTERM)
    status, text = script.done(20)
    assert status == STOPPED and text == "ready\nsaved\n"


def test_sigterm_between_two_starts_ends_the_script():
    script = started("--restarts", "5", "--wait", "60", "--", "false")
    script.wait_until(lambda: "starting again" in script.printed())
    script.signal(signal.SIGTERM)
    assert script.done(20).status == STOPPED


def process_of(script: Started) -> int:
    """The process that a script runs now."""
    children = pathlib.Path(f"/proc/{script.process.pid}/task/{script.process.pid}/children")
    return int(children.read_text().split()[0])


def test_four_processes_of_which_one_is_killed_end_as_an_uninterrupted_run(tmp_path):
    """The processes find each other as under Slurm, as with `qi2 train --distributed`."""
    training_program.train(tmp_path / "expected", STEPS)
    out, go = tmp_path / "run", tmp_path / "go"
    program = [sys.executable, "-m", training_program.__name__, str(out), str(STEPS), str(KILLED_AT), str(go)]
    count = training_program.PROCESSES
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    scripts = [
        started(
            *("--restarts", "5", "--wait", "1", "--", *program),
            environment=job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
        )
        for index in range(count)
    ]
    scripts[0].wait_until(lambda: (out / "metrics.jsonl").exists() and logged(out).keys() & {KILLED_AT})
    os.kill(process_of(scripts[KILLED]), signal.SIGKILL)
    go.touch()
    done = [script.done(120) for script in scripts]
    assert [status for status, _ in done] == [0] * count, "\n".join(text[-3000:] for _, text in done)
    assert all("starting again" in text for _, text in done)
    assert "restore" in toy.kinds(out) and toy.kinds(out)[-1] == "end"
    assert logged(out).keys() == logged(tmp_path / "expected").keys()
    runs_of.assert_close(out, tmp_path / "expected", STEPS)
