"""The training loop on a toy model: where a signal ends it, and what the resumed run makes up for."""

import dataclasses
import itertools
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest

from qi2_jax.runtime import signals
from qi2_jax.training import loop, reader, stopping
from qi2_jax.training import run as runs
from qi2_jax.training.checkpoints import files, manager
from qi2_jax.training.microbatch import Microbatch, Stats, as_update
from qi2_jax.training.telemetry import accounting, metrics
from tests.training.toy import config, evaluated, kinds, parsed, task, train


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
        signals._received = signals._remote = None
        signals._raised = signals._interruptible = False
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "6"]
    assert int(train(task(), settings, tmp_path).step) == 18


@pytest.mark.parametrize(
    ("where", "at", "ahead"),
    [("evaluate", 6, 0), ("evaluate", 6, 2), ("draw", 6, 0), ("draw", 12, 2), ("evaluate", 12, 0)],
)
def test_sigterm_cuts_validation_and_grids_short_and_they_are_made_up_for(where, at, ahead, tmp_path):
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
    assert not loop.is_finished(parsed(settings), {}, tmp_path / "cut")
    cut = train(task(evaluate=evaluate, draw=draw), settings, tmp_path / "cut")
    assert loop.is_finished(parsed(settings), {}, tmp_path / "cut")
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


def test_a_signal_that_any_process_receives_saves_after_the_step_in_progress(tmp_path, monkeypatch):
    """SIGTERM, SIGINT and SIGHUP alike: the loop asks only whether one came."""

    def evaluate(state, check_signals):
        if state.step == 6:
            monkeypatch.setattr(stopping.signals, "received", lambda: True)
        return {"validation_loss": 1.0}

    with pytest.raises(signals.Terminated):
        train(task(evaluate=evaluate), config(ahead=0), tmp_path)
    assert files.steps(tmp_path / "checkpoints") == [7] and kinds(tmp_path)[-1] == accounting.SIGTERM
