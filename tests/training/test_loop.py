"""The training loop on a toy model: when it gives up, what it reports, and what its checkpoints record."""

import dataclasses
import itertools
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from qi2_jax import sharding
from qi2_jax.reporting import run_report
from qi2_jax.runtime import signals
from qi2_jax.training import loop, reader, stopping
from qi2_jax.training import run as runs
from qi2_jax.training.checkpoints import files, manager
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.microbatch import Microbatch, Stats, as_update, put_scalar
from qi2_jax.training.task import Task
from qi2_jax.training.telemetry import accounting, metrics
from tests.training.test_step import OPTIMIZER, Toy, loss


def config(**train):
    return ml_collections.FrozenConfigDict(
        {
            "seed": 3,
            "ema_decay": 0.9,
            "optimizer": OPTIMIZER,
            "train": {
                **{"steps": 12, "ahead": 2, "log_every": 1, "max_skipped": 10, "watchdog_seconds": 0.0, "sinks": ()},
                **train,
            },
            "validation": {"every": 6},
            "samples": {"every": 6},
            "checkpoint": {"every": 100, "keep": 9, "keep_every": 0, "keep_best": 0, "checksums": False},
            "profile": {"start": 0, "steps": 1},
        }
    )


def mesh():
    return sharding.make_mesh(sharding.MeshShape(8, 1, 1))


@dataclasses.dataclass(kw_only=True)
class ToyTask(Task):
    """A toy model on the same batch in every step; batches in `spoilt` are not finite."""

    spoilt: Collection[int] = ()
    evaluate: Callable[..., Any] | None = None
    draw: Callable[..., Any] | None = None
    accumulate: bool = False
    peak_flops: float | None = None
    name: str = "toy"
    make_model = staticmethod(Toy)
    loss = staticmethod(loss)

    def __post_init__(self):
        self.data = {}
        self.frozen = put_scalar(mesh(), np.float32(0.5))
        self.evaluates, self.draws = self.evaluate is not None, self.draw is not None

    def microbatch(self, step):
        rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
        return Microbatch(0, rows * np.float32("nan") if step in self.spoilt else rows, stats=Stats(8))

    def updates(self, step):
        return (as_update([self.microbatch(later)]) for later in itertools.count(step + 1))

    def examples(self):
        return [self.microbatch(0)]


def task(spoilt=(), **fields):
    return ToyTask(spoilt=spoilt, **fields)


def train(task, config, out, **options):
    return loop.train(task, config, out, mesh(), **options)


def kinds(out):
    return [event["event"] for event in accounting.read_events(out / accounting.EVENTS)]


@pytest.mark.parametrize("first", [2, 3, 4, 5])
def test_max_skipped_steps_in_a_row_end_the_run_wherever_the_streak_begins(first, tmp_path):
    settings, spoilt = config(log_every=4, max_skipped=4), range(first, first + 4)
    with pytest.raises(runs.NonFiniteError, match=r"4 steps in a row (up to|before) step 8 were not finite"):
        train(task(spoilt), settings, tmp_path)
    assert files.steps(tmp_path / "checkpoints") == [8] and kinds(tmp_path)[-1] == accounting.ERROR
    assert int(train(task(spoilt), settings, tmp_path).step) == 12


def test_a_shorter_streak_does_not_end_the_run(tmp_path):
    assert int(train(task((2, 3, 4, 6, 7, 8)), config(log_every=4, max_skipped=4), tmp_path).skipped_total) == 6


def test_a_manifest_holds_only_what_was_evaluated_at_its_step(tmp_path):
    every = ml_collections.ConfigDict(config())
    every.checkpoint.every = 3
    train(task(evaluate=lambda state, _: {"validation_loss": float(state.step)}), every, tmp_path)
    found = {step: files.metric(tmp_path / "checkpoints" / str(step), "validation_loss") for step in (3, 6, 9, 12)}
    assert found == {3: None, 6: 6.0, 9: None, 12: 12.0}


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("train", {"sinks": ("foo",)}, r"metric sinks \['foo'\] are unknown"),
        ("profile", {"steps": 0}, "profile.steps is 0"),
        ("train", {"ahead": 32}, "train.ahead is 32; it must be at most 16"),
        ("checkpoint", {"local_every": 200, "local_folder": "/disk"}, "nothing would be saved locally"),
        ("checkpoint", {"keep_best": 2, "best_metric": ""}, "keep_best is 2, but checkpoint.best_metric names no"),
    ],
)
def test_a_run_that_is_refused_writes_nothing(group, values, message, tmp_path):
    wrong = ml_collections.ConfigDict(config())
    wrong[group].update(values)
    with pytest.raises(ValueError, match=message):
        train(task(), wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_best_metric_that_the_run_does_not_write_is_refused_at_the_first_logged_step(tmp_path):
    wrong = ml_collections.ConfigDict(config(log_every=2))
    wrong.checkpoint.update(every=1, keep_best=1, best_metric="validation_los")
    evaluated = task(evaluate=lambda state, _: {"validation_loss": float(state.step)})
    with pytest.raises(ValueError, match=r"best_metric is 'validation_los', .* one of .*'loss', .*'validation_loss'"):
        train(evaluated, wrong, tmp_path)
    assert files.steps(tmp_path / "checkpoints") == []
    for name in ("validation_loss", "loss"):
        wrong.checkpoint.best_metric = name
        train(evaluated, wrong, tmp_path / name)


def test_a_best_metric_that_was_never_written_is_refused_before_anything_is_deleted(tmp_path):
    kept = ml_collections.ConfigDict(config())
    kept.checkpoint.update(every=3, keep=1, keep_best=1, best_metric="loss")
    train(task(), kept, tmp_path)
    before = files.steps(tmp_path / "checkpoints")
    kept.checkpoint.best_metric, kept.train.steps = "los", 18
    with pytest.raises(ValueError, match=r"best_metric is 'los', .* Choose one of .*'loss'"):
        train(task(), kept, tmp_path)
    assert files.steps(tmp_path / "checkpoints") == before
    assert accounting.RESTORE in kinds(tmp_path)  # what is on record before: also what was found damaged
    kept.checkpoint.best_metric = "gradient_norm"
    assert int(train(task(), kept, tmp_path).step) == 18


def test_sigterm_while_restoring_damages_nothing(tmp_path, monkeypatch):
    """The newest checkpoint stays intact, and the run ends before the next step."""
    settings = ml_collections.ConfigDict(config())
    settings.checkpoint.update(checksums=True, every=6)
    train(task(), settings, tmp_path)
    settings.train.steps = 18
    before = signal.getsignal(signal.SIGTERM)
    for name in ("contents", "check", "describe"):
        original = getattr(manager, name)

        def interrupted(*arguments, original=original):
            signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        signals.listen(interruptible=True)
        with monkeypatch.context() as patch, pytest.raises(signals.Terminated):
            patch.setattr(manager, name, interrupted)
            train(task(), settings, tmp_path)
        assert kinds(tmp_path)[-1] == accounting.SIGTERM
        signal.signal(signal.SIGTERM, before)
        signals._received = signals._raised = signals._interruptible = False
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "6"]
    assert int(train(task(), settings, tmp_path).step) == 18


def test_a_run_in_a_folder_with_signs_of_a_url_is_known_as_finished(tmp_path):
    ended = ml_collections.ConfigDict(config())
    ended.checkpoint.checksums = True
    for name in ("run#7", "50%", "why?", "a%20b"):
        train(task(), ended, tmp_path / name)
        assert loop.is_finished(ended, {}, tmp_path / name)


def test_a_last_save_that_fails_is_an_error_and_no_end(tmp_path, monkeypatch):
    def fail(self, written, path, manifest):
        written.result()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_finish", fail)
    with pytest.raises(ValueError, match=r"saving step 12 in .* No space left"):
        train(task(), config(), tmp_path)
    assert kinds(tmp_path)[-1] == accounting.ERROR and accounting.END not in kinds(tmp_path)
    assert run_report.write_report(tmp_path / "page.html", tmp_path)[0]["state"].startswith(
        "failed: ValueError: saving"
    )


def test_a_finished_run_that_is_called_again_stays_finished(tmp_path):
    for _ in range(2):
        train(task(), config(), tmp_path)
        assert run_report.write_report(tmp_path / "page.html", tmp_path)[0]["state"] == "finished"


def evaluated(out):
    return [(line["step"], line["validation_loss"]) for line in metrics.lines(out / metrics.FILE) if len(line) == 2]


def test_a_finished_run_is_known_by_its_files(tmp_path):
    ended = ml_collections.ConfigDict(config())
    ended.checkpoint.update(checksums=True, every=6)
    spoilt = ml_collections.ConfigDict(ended).copy_and_resolve_references()
    spoilt.train.max_skipped = 1
    looks = {"evaluate": lambda state, _: {"validation_loss": 1.0}}
    train(task(**looks), ended, tmp_path)
    assert loop.is_finished(ended, {}, tmp_path)
    assert not loop.is_finished(ended, {}, tmp_path / "elsewhere")
    for key, value in (("ema_decay", 0.5), ("ema_ramp", True)):
        with pytest.raises(ValueError, match=key):
            loop.is_finished(ml_collections.ConfigDict({**ended, key: value}), {}, tmp_path)
    with pytest.raises(ValueError, match="data"):
        loop.is_finished(ended, {"other": 1}, tmp_path)
    longer = ended.copy_and_resolve_references()
    longer.train.steps = 18
    assert not loop.is_finished(longer, {}, tmp_path)
    told = (tmp_path / accounting.EVENTS).read_text()
    accounting.Events(tmp_path).write(accounting.SIGTERM, 12)
    assert not loop.is_finished(ended, {}, tmp_path)  # something may be left to do
    (tmp_path / accounting.EVENTS).write_text(told)
    assert loop.is_finished(ended, {}, tmp_path)
    (tmp_path / "checkpoints" / "12" / "manifest.json").write_text("{}")
    assert not loop.is_finished(ended, {}, tmp_path)
    with pytest.raises(runs.NonFiniteError):
        train(task((12,), **looks), spoilt, tmp_path / "spoilt")
    assert not loop.is_finished(spoilt, {}, tmp_path / "spoilt")  # saved at its end all the same


@pytest.mark.parametrize(
    ("where", "at", "ahead"),
    [("evaluate", 6, 0), ("evaluate", 6, 2), ("draw", 6, 0), ("draw", 12, 2), ("evaluate", 12, 0)],
)
def test_sigterm_cuts_validation_and_drawing_short_and_the_resumed_run_does_them_again(where, at, ahead, tmp_path):
    """The signal arrives at step 6, which would not be saved otherwise, or at the last step."""
    asked = []

    def evaluate(state, unless_terminating):
        if where == "evaluate" and state.step == at and not asked:
            asked.append(signal.raise_signal(signal.SIGTERM))
        unless_terminating()
        return {"validation_loss": float(state.model.up.weight.sum())}

    def draw(state, unless_terminating):
        if where == "draw" and state.step == at and not asked:
            asked.append(signal.raise_signal(signal.SIGTERM))
        unless_terminating()
        return {"toy": metrics.Drawing(np.full((2, 2, 3), int(state.step), np.uint8))}

    settings = ml_collections.ConfigDict(config(ahead=ahead, log_every=5))
    settings.checkpoint.checksums = True
    with pytest.raises(SystemExit) as stopped:
        train(task(evaluate=evaluate, draw=draw), settings, tmp_path / "cut")
    assert stopped.value.code == 0 and asked
    assert files.steps(tmp_path / "cut" / "checkpoints") == [at] and kinds(tmp_path / "cut")[-1] == accounting.SIGTERM
    assert [step for step, _ in evaluated(tmp_path / "cut")] == list(range(0, at + (where == "draw"), 6))
    assert not loop.is_finished(settings, {}, tmp_path / "cut")
    cut = train(task(evaluate=evaluate, draw=draw), settings, tmp_path / "cut")
    assert loop.is_finished(settings, {}, tmp_path / "cut")
    whole = train(task(evaluate=evaluate, draw=draw), settings, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    assert evaluated(tmp_path / "cut") == evaluated(tmp_path / "whole")
    drawn = [sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("cut", "whole")]
    assert drawn[0] == drawn[1] == ["toy-0.png", "toy-12.png", "toy-6.png"]


def test_a_state_from_the_hosts_own_disks_becomes_persistent_where_a_run_stops(tmp_path, capsys):
    """SIGTERM before the next step, and `train.steps` below the step of the state."""
    settings = ml_collections.ConfigDict(config(ahead=0))
    settings.checkpoint.update(local_every=1, local_folder=str(tmp_path / "disk"))

    class Crash(Exception):
        pass

    def crash(state, _):
        if state.step == 6:
            raise Crash
        return {"validation_loss": 1.0}

    for name in ("stopped", "shorter"):
        with pytest.raises(Crash):
            train(task(evaluate=crash), settings, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "6", ignore_errors=True)
        assert files.steps(tmp_path / name / "checkpoints") == [1]

    # A single process is ended by its own handler before the first step. Several processes agree first.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs.processes, "terminating", lambda: True)
        train(dataclasses.replace(task(evaluate=crash), accumulate=True), settings, tmp_path / "stopped")
    assert files.steps(tmp_path / "stopped" / "checkpoints") == [1, 5]
    assert "SIGTERM: saved step 5" in capsys.readouterr().out
    settings.train.steps = 4
    train(task(evaluate=crash), settings, tmp_path / "shorter")
    assert files.steps(tmp_path / "shorter" / "checkpoints") == [1, 5]


def test_sigterm_before_the_first_step_saves_nothing_and_says_so(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runs.processes, "terminating", lambda: True)
        train(dataclasses.replace(task(), accumulate=True), config(ahead=0), tmp_path)
    assert files.steps(tmp_path / "checkpoints") == [] and "SIGTERM: stopped; run again" in capsys.readouterr().out


def test_sigterm_ends_a_long_update_between_two_of_its_parts(tmp_path, monkeypatch):
    """The signal arrives while the second of three microbatches of step 5 is copied to the devices."""
    rows = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)
    update = as_update(
        Microbatch(0, part, stats=Stats(8, 16, metrics={"batch/part": float(place)})) for place, part in enumerate(rows)
    )
    parts = task(
        evaluate=lambda state, _: {"validation_loss": float(state.model.up.weight.sum())},
        accumulate=True,
    )
    parts.updates = lambda step: itertools.repeat(update)
    parts.examples = lambda: update[:1]
    settings, put, calls = config(ahead=0, log_every=3), reader.put, itertools.count(1)

    def put_and_stop(mesh, microbatch):
        if next(calls) == 4 * 3 + 2:
            signal.raise_signal(signal.SIGTERM)
        return put(mesh, microbatch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(reader, "put", put_and_stop)
        train(parts, settings, tmp_path / "cut")
    assert stopped.value.code == 0 and kinds(tmp_path / "cut")[-1] == accounting.SIGTERM
    assert files.steps(tmp_path / "cut" / "checkpoints") == [4]
    jax.tree.map(
        np.testing.assert_array_equal,
        train(parts, settings, tmp_path / "cut"),
        train(parts, settings, tmp_path / "whole"),
    )
    lines = [line for line in metrics.lines(tmp_path / "cut" / metrics.FILE) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 6, 9, 12] and {line["batch/part"] for line in lines} == {1.0}
    (fourth,) = (line for line in lines if line["step"] == 4)
    assert fourth["images_per_second"] * fourth["time/seconds"] == pytest.approx(24)  # one update, not one and a half


def test_utilisation_is_that_of_one_chip(tmp_path):
    whole = task(peak_flops=2e12)
    microbatch = whole.microbatch(1)
    whole.updates = lambda step: itertools.repeat([microbatch._replace(stats=Stats(8, flops=3e12))])
    train(whole, config(log_every=12), tmp_path)
    (line,) = metrics.lines(tmp_path / metrics.FILE)
    assert line["model_tflops_per_second_per_chip"] * line["time/seconds"] == pytest.approx(12 * 3 / 8)
    assert line["mfu"] == pytest.approx(line["model_tflops_per_second_per_chip"] / 2)


class Busy:
    """A loss whose computation takes a while."""

    def __init__(self, loss, seconds):
        self.loss, self.until = float(loss), time.monotonic() + seconds

    def __float__(self):
        return self.loss

    def is_ready(self):
        return time.monotonic() >= self.until

    def block_until_ready(self):
        time.sleep(max(0.0, self.until - time.monotonic()))
        return self


@pytest.mark.parametrize("step_seconds", [0.0, 0.4])
@pytest.mark.parametrize("ahead", [0, 2])
def test_only_reading_for_which_the_devices_wait_is_time_of_data(step_seconds, ahead, tmp_path, monkeypatch):
    """A loader takes 0.1 s per update: all of it is data time if steps are instant, none if they take longer."""
    update, slept = loop.Compiled.__call__, []

    def busy(*arguments):
        state, values = update(*arguments)
        return state, values | {"loss": Busy(values["loss"], step_seconds)}

    def slow(updates):
        for update in updates:
            begun = time.monotonic()
            time.sleep(0.1)
            slept.append(time.monotonic() - begun)
            yield update

    monkeypatch.setattr(loop.Compiled, "__call__", busy)
    slow_task = task()
    fast = slow_task.updates
    slow_task.updates = lambda step: slow(fast(step))
    train(slow_task, config(steps=5, ahead=ahead, log_every=5), tmp_path)
    (line,) = metrics.lines(tmp_path / metrics.FILE)
    # The first update is read before the first step.
    waited, hidden = line["time/data"] * line["time/seconds"], sum(slept[1:]) if step_seconds else 0.0
    assert sum(slept) - hidden - 0.05 <= waited <= sum(slept) - hidden + 0.3


def test_without_a_terminal_every_logged_step_prints_a_line(tmp_path, capsys):
    train(task(), config(log_every=4), tmp_path)
    printed = capsys.readouterr()
    assert "toy: step 0 of 12, training 288 parameters on 8 x cpu (data=8 x fsdp=1 x tensor=1)" in printed.out
    lines = [line for line in printed.err.splitlines() if line.startswith("toy ")]
    assert [line.split(":")[0] for line in lines] == ["toy 4/12", "toy 8/12", "toy 12/12"]
    assert re.fullmatch(r"toy 4/12: loss [\d.]+, [\d.]+ samples/s, [\d.e-]+ s/step, [\d:]+ left", lines[0])


@pytest.mark.parametrize(
    ("error", "is_data"),
    [
        (KeyError("latents"), True),
        (Image.DecompressionBombError("too many pixels"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_errors_of_the_data_are_told_from_errors_of_the_devices(error, is_data, tmp_path):
    def updates(start):
        raise error
        yield

    broken = task()
    broken.updates = updates
    with pytest.raises(reader.DataError if is_data else jax.errors.JaxRuntimeError, match=str(error.args[0])):
        train(broken, config(), tmp_path)


def test_an_implicit_copy_to_the_devices_within_a_step_is_an_error(tmp_path):
    implicit = task()
    implicit.frozen = np.float32(0.5)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(implicit, config(), tmp_path)


def test_a_signal_that_any_process_receives_saves_after_the_step_in_progress(tmp_path, monkeypatch):
    """SIGTERM, SIGINT and SIGHUP alike: the loop asks only whether one came."""

    def evaluate(state, check_signals):
        if state.step == 6:
            monkeypatch.setattr(stopping.signals, "received", lambda: True)
        return {"validation_loss": 1.0}

    with pytest.raises(signals.Terminated):
        train(task(evaluate=evaluate), config(ahead=0), tmp_path)
    assert files.steps(tmp_path / "checkpoints") == [6] and kinds(tmp_path)[-1] == accounting.SIGTERM
