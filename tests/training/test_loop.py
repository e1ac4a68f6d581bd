"""The training loop on a toy model: when it gives up, and what its checkpoints record."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from qi2_jax.reporting import run_report
from qi2_jax.training import loop, reader
from qi2_jax.training import run as runs
from qi2_jax.training.checkpoints import files
from qi2_jax.training.checkpoints.manager import Checkpoints
from qi2_jax.training.telemetry import accounting
from tests.training.toy import config, kinds, parsed, task, train


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
    every = config()
    every.checkpoint.every = 3
    train(task(evaluate=lambda state, _: {"validation_loss": float(state.step)}), every, tmp_path)
    found = {step: files.metric(tmp_path / "checkpoints" / str(step), "validation_loss") for step in (3, 6, 9, 12)}
    assert found == {3: None, 6: 6.0, 9: None, 12: 12.0}


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("train", {"sinks": ("foo",)}, r"train.sinks \['foo'\] are unknown"),
        ("profile", {"steps": 0}, "profile.steps is 0"),
        ("train", {"ahead": 32}, "train.ahead is 32; it must be at most 16"),
        ("checkpoint", {"local_every": 200, "local_folder": "/disk"}, "nothing would be saved locally"),
        ("checkpoint", {"keep_best": 2, "best_metric": ""}, "keep_best is 2, but best_metric names no"),
    ],
)
def test_a_run_that_is_refused_writes_nothing(group, values, message, tmp_path):
    wrong = config()
    wrong[group].update(values)
    with pytest.raises(ValueError, match=message):
        train(task(), wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_best_metric_that_the_run_does_not_write_is_refused_at_the_first_logged_step(tmp_path):
    wrong = config(log_every=2)
    wrong.checkpoint.update(every=1, keep_best=1, best_metric="validation_los")
    evaluated = task(evaluate=lambda state, _: {"validation_loss": float(state.step)})
    with pytest.raises(ValueError, match=r"best_metric is 'validation_los', .* one of .*'loss', .*'validation_loss'"):
        train(evaluated, wrong, tmp_path)
    assert files.steps(tmp_path / "checkpoints") == []
    for name in ("validation_loss", "loss"):
        wrong.checkpoint.best_metric = name
        train(evaluated, wrong, tmp_path / name)


def test_a_best_metric_that_was_never_written_is_refused_before_anything_is_deleted(tmp_path):
    kept = config()
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


def test_a_run_in_a_folder_with_signs_of_a_url_is_known_as_finished(tmp_path):
    ended = config()
    ended.checkpoint.checksums = True
    for name in ("run#7", "50%", "why?", "a%20b"):
        train(task(), ended, tmp_path / name)
        assert loop.is_finished(parsed(ended), {}, tmp_path / name)


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


def test_a_finished_run_is_known_by_its_files(tmp_path):
    ended = config()
    ended.checkpoint.update(checksums=True, every=6)
    spoilt = ml_collections.ConfigDict(ended).copy_and_resolve_references()
    spoilt.train.max_skipped = 1
    looks = {"evaluate": lambda state, _: {"validation_loss": 1.0}}
    train(task(**looks), ended, tmp_path)
    assert loop.is_finished(parsed(ended), {}, tmp_path)
    assert not loop.is_finished(parsed(ended), {}, tmp_path / "elsewhere")
    for key, value in (("ema_decay", 0.5), ("ema_ramp", True)):
        with pytest.raises(ValueError, match=key):
            loop.is_finished(parsed(ml_collections.ConfigDict({**ended, key: value})), {}, tmp_path)
    with pytest.raises(ValueError, match="data"):
        loop.is_finished(parsed(ended), {"other": 1}, tmp_path)
    longer = ended.copy_and_resolve_references()
    longer.train.steps = 18
    assert not loop.is_finished(parsed(longer), {}, tmp_path)
    told = (tmp_path / accounting.EVENTS).read_text()
    accounting.Events(tmp_path).write(accounting.SIGTERM, 12)
    assert not loop.is_finished(parsed(ended), {}, tmp_path)  # something may be left to do
    (tmp_path / accounting.EVENTS).write_text(told)
    assert loop.is_finished(parsed(ended), {}, tmp_path)
    (tmp_path / "checkpoints" / "12" / "manifest.json").write_text("{}")
    assert not loop.is_finished(parsed(ended), {}, tmp_path)
    with pytest.raises(runs.NonFiniteError):
        train(task((12,), **looks), spoilt, tmp_path / "spoilt")
    assert not loop.is_finished(parsed(spoilt), {}, tmp_path / "spoilt")  # saved at its end all the same


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


def test_processes_may_talk_to_each_other_between_two_microbatches(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.processes, "terminating", lambda: bool(jnp.any(np.zeros(3))))
    assert int(train(task(accumulate=True), config(ahead=0, steps=2), tmp_path).step) == 2
