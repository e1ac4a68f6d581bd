"""Where a run's time goes."""

import math
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from qi2_jax.training.telemetry import accounting
from qi2_jax.training.telemetry.accounting import Events, Goodput, Idle, Stopwatch, goodput, read_events
from qi2_jax.training.telemetry.metrics import Metrics


def test_every_moment_belongs_to_the_innermost_category(monkeypatch):
    clock = iter([0, 1, 3, 4, 6, 10, 20])
    monkeypatch.setattr(accounting.time, "monotonic", lambda: next(clock))
    watch = Stopwatch()  # 0
    with watch.measure("evaluate"), watch.measure("sample"):  # 1, 3; left at 4, 6
        pass
    lap = watch.lap()  # 10
    assert lap.pop("time/seconds") == 10
    expected = {"steps": 0.5, "evaluate": 0.4, "sample": 0.1, "data": 0, "save": 0, "compile": 0}
    assert lap == {f"time/{name}": share for name, share in expected.items()}
    assert watch.lap() == {**dict.fromkeys(lap, 0), "time/seconds": 10, "time/steps": 1}  # 20


@pytest.mark.parametrize(("since", "data"), [(-math.inf, 4), (2, 4), (5, 2), (9, 0), (math.inf, 0)])
def test_what_lies_before_a_moment_stays_with_the_category_around(since, data, monkeypatch):
    clock = iter([0, 1, 3, 7, 10, 20])
    monkeypatch.setattr(accounting.time, "monotonic", lambda: next(clock))
    watch = Stopwatch()  # 0
    with watch.measure("evaluate"), watch.measure("data", lambda: since):  # 1, 3; left at 7, 10
        pass
    lap = watch.lap()  # 20
    assert lap["time/data"] * 20 == pytest.approx(data) and lap["time/evaluate"] * 20 == pytest.approx(9 - data)


class Result:
    """Of a computation, ready when it is said to be."""

    def __init__(self):
        self.done = threading.Event()
        self.is_ready = self.done.is_set


def test_devices_are_idle_from_the_moment_at_which_the_last_result_is_ready():
    result = Result()
    with Idle(None) as never_busy:
        assert never_busy.since == -math.inf
    with Idle(result) as idle:
        time.sleep(0.02)
        assert idle.since == math.inf
        begun = time.monotonic()
        result.done.set()
        while idle.since == math.inf and time.monotonic() < begun + 60:
            time.sleep(0.001)
        assert begun <= idle.since <= time.monotonic()
    with Idle(result) as idle:
        assert idle.since == -math.inf


def test_a_block_that_ends_or_fails_before_the_devices_waits_for_nothing():
    with Idle(Result()) as idle:
        pass
    assert idle.since == math.inf
    with pytest.raises(KeyError), Idle(Result()):
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "idle"]


def test_a_result_of_jax_tells_when_it_is_ready():
    with Idle(jax.block_until_ready(jnp.ones(3) + 1)) as idle:
        assert idle.since == -math.inf


def test_an_error_ends_its_category_and_unknown_ones_are_refused():
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.measure("data"):
        raise KeyError
    watch.lap()
    time.sleep(0.01)
    assert watch.lap()["time/steps"] == 1
    with pytest.raises(ValueError, match="'dat' is unknown; choose one of"), watch.measure("dat"):
        pass


def test_events_survive_a_resume_and_a_line_that_a_kill_cut(tmp_path):
    events = Events(tmp_path)
    events.write("start", 0, name="demo")
    with events.measure("save", 5):
        time.sleep(0.01)
    with events.path.open("a") as file:
        file.write('{"time": 17, "ev')
    Events(tmp_path).write("restore", 5, seconds=1.5)
    start, save, restore = read_events(events.path)
    assert start["event"] == "start" and start["name"] == "demo" and abs(start["time"] - time.time()) < 60
    assert save["seconds"] >= 0.01 and save["step"] == 5
    assert restore["seconds"] == 1.5
    assert read_events(tmp_path / "missing") == []


def line(seconds: float, share: float) -> dict[str, float]:
    return {"time/seconds": seconds, "time/steps": share}


def event(kind: str, moment: float) -> dict:
    return {"event": kind, "time": moment}


def test_goodput_is_kept_steps_over_wall_time():
    lines = [{"step": 0, "validation_loss": 1.0}, line(40, 0.5), line(60, 1.0)]
    assert goodput([event("start", 1000)], lines, until=1100) == 0.8
    assert goodput([], lines, until=1100) is None


def test_a_kill_and_what_it_makes_the_run_do_again_lower_goodput(tmp_path):
    """Steps 1-20 in 20 s, saved at 10, killed at 20, started again 5 s later, and 11-20 done again."""
    run = Metrics(tmp_path, 0, sinks=())
    for step in (10, 20):
        run.write(step, line(10, 1.0))
    events = [event("start", 0)]
    assert goodput(events, accounting.metrics.lines(run.path), until=20) == 1.0
    resumed = Metrics(tmp_path, 10, sinks=())  # drops the line of step 20
    events.append(event("start", 25))
    resumed.write(20, line(10, 1.0))
    assert goodput(events, accounting.metrics.lines(run.path), until=35) == pytest.approx(20 / 35)


def test_time_without_a_process_is_lost_unless_the_run_had_ended():
    lines = [line(50, 1.0), line(50, 1.0)]
    preempted = [event("start", 0), event("sigterm", 50), event("start", 150)]
    assert goodput(preempted, lines, until=200) == 0.5
    ended = [event("start", 0), event("end", 50), event("start", 150)]
    assert goodput(ended, lines, until=200) == 1.0
    assert goodput([*ended, event("end", 200)], lines, until=10_000) == 1.0


def test_running_goodput_is_that_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(accounting.time, "time", lambda: 100.0)
    events, run = Events(tmp_path), Metrics(tmp_path, 0, sinks=())
    assert Goodput(tmp_path).add(line(1, 1.0)) == {}
    events.write("start", 0)
    run.write(1, line(10, 0.5))
    running = Goodput(tmp_path)
    monkeypatch.setattr(accounting.time, "time", lambda: 150.0)
    added = line(20, 1.0)
    assert running.add(added) == {"goodput": 0.5}
    run.write(2, added)
    assert goodput(read_events(events.path), accounting.metrics.lines(run.path)) == 0.5


def test_throughput_states_what_is_known():
    rates = accounting.throughput(64, 64 * 1024, 4e15, 2.0, chips=4, peak=1e15, padding=0.25, useful=0.5)
    assert rates == {
        "images_per_second": 32,
        "tokens_per_second": 24576,
        "slots_per_second": 32768,
        "model_tflops_per_second_per_chip": 250,
        "mfu": 0.25,
        "mfu_slots": 0.5,
    }
    assert "mfu" not in accounting.throughput(64, 1, 4e15, 2.0, 4)
    without = accounting.throughput(64, 1, None, 2.0, 4, 1e15)
    assert list(without) == ["images_per_second", "tokens_per_second", "slots_per_second"]
    assert list(accounting.throughput(64, 0, None, 2.0, 4)) == ["images_per_second"]


def test_memory_is_that_of_the_fullest_device_that_tells(monkeypatch):
    assert accounting.device_memory() == {}

    class Device:
        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            if self.stats is KeyError:
                raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")
            return self.stats

    devices = [Device(None), Device(KeyError), Device({"bytes_in_use": 1 << 30}), Device({"bytes_in_use": 3 << 30})]
    monkeypatch.setattr(accounting.jax, "local_devices", lambda: devices)
    assert accounting.device_memory() == {"memory/gib_in_use": 3.0}


def test_a_start_says_what_runs():
    facts = accounting.program()
    assert facts["devices"] == 8 and facts["processes"] == 1 and facts["jax"] == jax.__version__
    assert facts["commit"] is None or facts["commit"]


def test_a_commit_is_that_of_the_source_and_of_no_repository_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "of somebody else")
    monkeypatch.setattr(accounting, "__file__", str(tmp_path / "qi2_jax" / "training" / "telemetry" / "accounting.py"))
    assert accounting.program()["commit"]
    installed = tmp_path / "venv" / "lib"
    installed.mkdir(parents=True)
    monkeypatch.setattr(accounting, "__file__", str(installed / "qi2_jax" / "training" / "telemetry" / "accounting.py"))
    assert accounting.program()["commit"] is None
