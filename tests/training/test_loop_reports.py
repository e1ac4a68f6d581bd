"""The training loop on a toy model: throughput, time of data, and lines of a log."""

import itertools
import re
import time

import pytest

from qi2_jax.training import loop
from qi2_jax.training.microbatch import Stats
from qi2_jax.training.telemetry import accounting, metrics
from tests.training.toy import config, task, train


def test_utilisation_is_that_of_one_chip(tmp_path):
    whole = task(peak_flops=2e12)
    microbatch = whole.microbatch(1)
    whole.updates = lambda step: itertools.repeat([microbatch._replace(stats=Stats(8, flops=3e12))])
    train(whole, config(log_every=12), tmp_path)
    (line,) = metrics.lines(tmp_path / metrics.FILE)
    assert line["model_tflops_per_second_per_chip"] * line["time/seconds"] == pytest.approx(12 * 3 / 8)
    assert line["mfu"] == pytest.approx(line["model_tflops_per_second_per_chip"] / 2)


class Clock:
    """A clock that only the test advances, in place of the module `time`."""

    def __init__(self):
        self.now, self.time = 0.0, time.time

    def monotonic(self):
        return self.now


class Busy:
    """A loss whose computation takes a while."""

    def __init__(self, loss, seconds, clock):
        self.loss, self.until, self.clock = float(loss), clock.now + seconds, clock

    def __float__(self):
        return self.loss

    def is_ready(self):
        return self.clock.now >= self.until

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.until)
        return self


@pytest.mark.parametrize("step_seconds", [0.0, 0.4])
@pytest.mark.parametrize("ahead", [0, 2])
def test_only_reading_for_which_the_devices_wait_is_time_of_data(step_seconds, ahead, tmp_path, monkeypatch):
    """A loader takes 0.1 s per update: all of it is data time if steps are instant, none if they take longer."""
    update, clock = loop.Compiled.__call__, Clock()

    def busy(*arguments):
        state, values = update(*arguments)
        return state, values | {"loss": Busy(values["loss"], step_seconds, clock)}

    def slow(updates):
        for update in updates:
            clock.now += 0.1
            yield update

    monkeypatch.setattr(loop.Compiled, "__call__", busy)
    monkeypatch.setattr(accounting, "time", clock)
    slow_task = task()
    fast = slow_task.updates
    slow_task.updates = lambda step: slow(fast(step))
    train(slow_task, config(steps=5, ahead=ahead, log_every=5), tmp_path)
    (line,) = metrics.lines(tmp_path / metrics.FILE)
    # The first update is read before the first step.
    assert line["time/data"] * line["time/seconds"] == pytest.approx(0.1 if step_seconds else 0.5)


def test_without_a_terminal_every_logged_step_logs_a_line(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    train(task(), config(log_every=4), tmp_path)
    printed = capsys.readouterr()
    assert "toy: step 0 of 12, training 288 parameters on 8 x cpu (data=8 x fsdp=1 x tensor=1)" in printed.out
    lines = [line for line in caplog.messages if line.startswith("toy ")]
    assert [line.split(":")[0] for line in lines] == ["toy 4/12", "toy 8/12", "toy 12/12"]
    assert re.fullmatch(r"toy 4/12: loss [\d.]+, [\d.]+ samples/s, [\d.e-]+ s/step, [\d:]+ left", lines[0])
