"""Two real processes agree on the signal that one of them received."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import signal, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from qi2_jax.runtime import meeting, processes, signals

index, address, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
group = meeting.Group("test", address, 2, index, join_seconds=100)
signals.listen(interruptible=True)
with signals.ending(), processes.joined(group):
    processes.gather("")
    print("joined", flush=True)
    if where == "step":  # the signal waits, and the program ends by itself
        while index == 1 and not signals.received():
            time.sleep(0.05)
        with processes.raise_together(interruptible=False):
            pass
        raise signals.Terminated(reported=True)
    with processes.raise_together():
        time.sleep(60 if index == 1 else 0)
    print("not reached", flush=True)
"""


@pytest.mark.parametrize("where", ["step", "block"])
def test_a_signal_to_one_process_gives_all_of_them_its_status(where):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), address, where],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for index in range(2)
    ]
    for line in both[1].stdout:
        if line == "joined\n":
            break
    both[1].send_signal(signal.SIGINT)
    for index, process in enumerate(both):
        out, err = process.communicate(timeout=100)
        assert process.returncode == 130 and "not reached" not in out and "Traceback" not in err, err
        assert ("SIGINT: stopped; run again" in err) == (where == "block" and index == 0)
