"""A process that hangs is ended, whatever it hangs in; a healthy one is left alone."""

import subprocess
import sys
import threading
import types

import pytest

from qi2_jax.training.telemetry import accounting, watchdog

PROGRAM = """
import ctypes, os, pathlib, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from qi2_jax.training.telemetry import watchdog
watchdog.GRACE = 2.0

def hang_in_a_pipe():
    os.read(os.pipe()[0], 1)

def hang_in_a_computation():
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > -1, lambda x: (x + 1) % 1000, x))
    endless(jnp.int32(0)).block_until_ready()

def hang_with_pythons_lock():
    ctypes.PyDLL(None).sleep(600)

def compile_for_long():
    with dog.phase("compile", seconds=60):
        time.sleep(3)

def hang_after_compiling():
    compile_for_long()
    time.sleep(600)

dog = watchdog.Watchdog(2.0, pathlib.Path(sys.argv[2]))
with dog.phase("step 12"):
    globals()[sys.argv[1]]()
dog.close()
print("done")
"""


def run(what: str, directory) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, what, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("where", ["hang_in_a_pipe", "hang_in_a_computation", "hang_after_compiling"])
def test_a_process_that_hangs_is_ended_and_says_where(where, tmp_path):
    done = run(where, tmp_path / "run")
    assert done.returncode == watchdog.STATUS and "done" not in done.stdout
    for text in (done.stderr, (tmp_path / "run" / "stacks-0.txt").read_text()):
        assert "no progress for 2 s in 'step 12' (limit 2 s)" in text
        assert f"in {where}" in text and "watchdog.py" in text
    (event,) = accounting.read_events(tmp_path / "run" / accounting.EVENTS)
    assert event["event"] == "error" and "step 12" in event["message"]


def test_a_process_whose_c_code_holds_pythons_lock_is_ended(tmp_path):
    done = run("hang_with_pythons_lock", tmp_path)
    assert done.returncode == 1
    assert "in hang_with_pythons_lock" in done.stderr


def test_a_process_whose_phases_are_each_within_their_limits_is_left_alone(monkeypatch, tmp_path):
    """On a clock that the test advances: the phases together take far longer than one limit."""
    now, looked, expired = [0.0], threading.Event(), []

    def monotonic():
        looked.set()
        return now[0]

    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(watchdog.Watchdog, "_expire", lambda _, *what: expired.append(what))
    with watchdog.Watchdog(2.0, tmp_path) as dog:
        for seconds, limit in ((1.6, None), (1.6, None), (30.0, 60.0)):
            with dog.phase("step", limit):
                now[0] += seconds
                looked.clear()
                assert looked.wait(60)  # the watcher has looked at the clock
    assert not expired and not any(tmp_path.iterdir())


def test_off_and_out_of_range(tmp_path):
    with watchdog.Watchdog(0, tmp_path) as dog, dog.phase("step 1", seconds=1e-9):
        dog.beat("more")
    with pytest.raises(ValueError, match=r"-1 s; give 0 \(off\) or more"):
        watchdog.Watchdog(-1, tmp_path)
