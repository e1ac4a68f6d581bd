"""A run whose checkpoints are gone does not begin again at step 0 without a word."""

import json
import shutil

import ml_collections
import pytest

from qi2_jax.training import restarting
from qi2_jax.training.checkpoints import files
from qi2_jax.training.telemetry import accounting, metrics
from tests.training.toy import config, task, train


def every(steps, **changes):
    settings = ml_collections.ConfigDict(config())
    settings.checkpoint.every = steps
    settings.update(changes)
    return settings


def test_a_run_whose_checkpoints_are_gone_is_refused_and_can_begin_anew(tmp_path):
    settings = every(6)
    train(task(), settings, tmp_path)
    before = (tmp_path / metrics.FILE).read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    for other in (settings, every(6, seed=4)):
        with pytest.raises(ValueError, match=r"run that saved step 12, but .*checkpoints has none.* --restart"):
            train(task(), other, tmp_path)
    assert (tmp_path / metrics.FILE).read_bytes() == before and not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3

    assert int(train(task(), every(6, seed=4), tmp_path, restart=True).step) == 12
    assert [line["step"] for line in metrics.lines(tmp_path / metrics.FILE)] == list(range(1, 13))
    assert (tmp_path / (metrics.FILE + restarting.SET_ASIDE)).read_bytes() == before
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 4


def test_a_restart_that_is_killed_before_its_first_checkpoint_just_starts(tmp_path):
    train(task(), every(6), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    restarting.check(tmp_path, restart=True)
    restarting.check(tmp_path)


def test_restart_does_not_touch_a_run_that_has_checkpoints(tmp_path):
    train(task(), every(6), tmp_path)
    longer = every(6)
    longer.train.steps = 14
    assert int(train(task(), longer, tmp_path, restart=True).step) == 14
    assert [line["step"] for line in metrics.lines(tmp_path / metrics.FILE)] == list(range(1, 15))


def test_a_run_that_was_killed_before_its_first_checkpoint_just_starts(tmp_path):
    class Killed(BaseException):
        pass

    def evaluate(state, check_signals):
        if state.step == 6:
            raise Killed
        return {"validation_loss": 1.0}

    with pytest.raises(Killed):
        train(task(evaluate=evaluate), every(100), tmp_path)
    assert files.steps(tmp_path / "checkpoints") == [] and list(metrics.lines(tmp_path / metrics.FILE))
    assert int(train(task(), every(100), tmp_path).step) == 12


START, SAVE = {"event": "start", "step": 0}, {"event": "save"}


@pytest.mark.parametrize(
    ("events", "saved"),
    [
        ([], None),
        ([START, SAVE | {"step": 4}], None),  # it may have been killed during that save
        ([START, SAVE | {"step": 4}, {"event": "commit", "step": 4}], 4),
        ([START, SAVE | {"step": 4}, SAVE | {"step": 8}], 4),  # a save waits for the one before it
        ([START, SAVE | {"step": 4}, START, SAVE | {"step": 3}], None),
        ([START, SAVE | {"step": 4}, SAVE | {"step": 6, "local": True}], None),
        ([START, SAVE | {"step": 4}, {"event": "sigterm", "step": 4}], 4),
        ([START, {"event": "sigterm", "step": 0}], None),
        ([START, SAVE | {"step": 4}, {"event": "end", "step": 4}], 4),
        ([START, {"event": "restore", "step": 8}], 8),
        ([{"event": "commit", "step": "4"}, {"event": "commit"}], None),
    ],
)
def test_what_events_prove_to_be_saved(events, saved, tmp_path):
    lines = [json.dumps({"time": 1.0, **event}) for event in events]
    (tmp_path / accounting.EVENTS).write_text("\n".join(lines) + "\n")
    assert restarting.last_saved(tmp_path) == saved


@pytest.mark.parametrize(
    ("last", "saved", "steps", "events"),
    [(7, None, 100, False), (8, None, 100, False), (9, 4, 100, False), (6, 6, 6, False), (6, None, 6, True)],
)
def test_without_events_the_metrics_prove_the_first_save_or_the_end(last, saved, steps, events, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"every": 4}, "train": {"steps": steps}}))
    if events:  # that do not tell of a save: it may have been killed during that of its last step
        (tmp_path / accounting.EVENTS).write_text(json.dumps(START) + "\n")
    (tmp_path / metrics.FILE).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, last + 1)))
    assert restarting.last_saved(tmp_path) == saved
