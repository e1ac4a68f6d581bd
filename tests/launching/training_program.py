"""One process of a small training with the real loop, for test_start_script.py: OUT, steps, and where it waits.

    python tests/launching/training_program.py OUT STEPS [WAIT_AT GO]

The processes find each other through the cluster's variables, as with `qi2 train --distributed`. With WAIT_AT, the
process waits after this step until the file GO exists.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from qi2_jax import sharding
from qi2_jax.runtime import meeting, processes, signals
from qi2_jax.training.microbatch import Microbatch, Stats
from qi2_jax.training.run import Run
from tests.training import toy

PROCESSES, DEVICES = 4, 8


class Task(toy.ToyTask):
    """The toy on another batch in every step. A process has its rows of it."""

    def microbatch(self, step: int) -> Microbatch:
        rows = np.random.default_rng(step).normal(size=(DEVICES, 8)).astype(np.float32)
        return Microbatch(0, rows[list(sharding.local_rows(toy.mesh(), DEVICES))], stats=Stats(DEVICES))


def train(out: pathlib.Path, steps: int) -> None:
    config = toy.config(steps=steps)
    config.checkpoint.every = 2
    toy.train(Task(), config, out)


def main(out: str, steps: str, wait_at: str = "", go: str = "") -> None:
    log = Run.log

    def log_and_wait(self: Run, step: int) -> None:
        log(self, step)
        while str(step) == wait_at and not pathlib.Path(go).exists():
            time.sleep(0.02)

    Run.log = log_and_wait
    signals.listen(interruptible=True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // PROCESSES)
    with signals.ending(), processes.joined(meeting.Group("train", processes=PROCESSES, distributed=True)):
        train(pathlib.Path(out), int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
