"""The scheduler follows the model: from an imported folder into every run that starts from it, and into its export."""

import json
import os
import shutil

import pytest

from qi2_jax.diffusion.schedule import Schedule
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import components, folder
from qi2_jax.runs import locating, model_folder, paths

SIGMAS = [1.0, 0.75, 0.5, 0.25]
STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}
TURBO = Schedule(Shift(dynamic=False, max_tokens=4096, max_shift=1.15, shift=3.0), None, tuple(SIGMAS))
SHIFT = Shift(max_shift=0.7)  # of the run's configuration


def linked(source, out):
    shutil.copytree(source, out, copy_function=os.link)
    return out


def rewrite(path, values):
    path.unlink()  # the file is a link to one that other tests read
    path.write_text(json.dumps(values))


@pytest.fixture
def turbo(imported, tmp_path):
    """An imported few-step model."""
    out = linked(imported, tmp_path / "turbo")
    rewrite(out / folder.SCHEDULER, STATIC)
    rewrite(out / folder.INDEX, json.loads((imported / folder.INDEX).read_text()) | {"sample_sigmas": SIGMAS})
    return out


def begin(imported, run, start, shift=SHIFT):
    """The model folder of a run that starts from `start`."""
    model = run / paths.MODEL
    if not model.exists():
        linked(imported, model)
        for name in (folder.MARK, folder.INDEX, folder.SCHEDULER, "transformer/config.json"):
            (model / name).unlink()
    config = components.read_config(imported / "transformer", "transformer")
    model_folder.finish(model, config, shift, str(start))
    return model


def train(run, step=4):
    """What finding the run's model needs of a checkpoint."""
    (run / paths.CHECKPOINTS / str(step)).mkdir(parents=True)


def test_a_run_keeps_the_scheduler_of_the_imported_folder_it_starts_from(imported, turbo, tmp_path):
    run = tmp_path / "run"
    model = begin(imported, run, turbo)
    assert folder.read_schedule(model) == model_folder.kept_schedule(model) == TURBO
    line = model_folder.describe_scheduler(model, SHIFT)
    assert str(turbo) in line and "sample_sigmas=(1.0, 0.75, 0.5, 0.25)" in line and "max_shift=0.7" in line
    folder.export_folder(model, tmp_path / "out")
    assert (tmp_path / "out" / folder.SCHEDULER).read_bytes() == (turbo / folder.SCHEDULER).read_bytes()
    assert json.loads((tmp_path / "out" / folder.INDEX).read_text())["sample_sigmas"] == SIGMAS
    assert folder.read_schedule(tmp_path / "out") == TURBO


def test_it_stays_when_the_run_goes_on_without_the_start(imported, turbo, tmp_path):
    run = tmp_path / "run"
    model = begin(imported, run, turbo)
    train(run)
    shutil.rmtree(turbo)
    for start in ("", turbo):
        begin(imported, run, start)
        assert folder.read_schedule(model) == TURBO


def test_it_follows_from_run_to_run(imported, turbo, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    begin(imported, first, turbo)
    train(first)
    assert locating.locate(first).checkpoint is not None
    assert folder.read_schedule(begin(imported, second, first)) == TURBO


def test_a_run_without_an_imported_start_samples_by_its_own_shift(imported, turbo, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model = begin(imported, first, "")
    assert folder.read_schedule(model) == Schedule(SHIFT) and model_folder.kept_schedule(model) is None
    assert model_folder.describe_scheduler(model, SHIFT) is None
    train(first)
    other = Shift(max_shift=0.8)
    assert folder.read_schedule(begin(imported, second, first, other)) == Schedule(other)
    # Before the first checkpoint the start may still change.
    begin(imported, second, turbo, other)
    assert folder.read_schedule(begin(imported, second, "", other)) == Schedule(other)


def test_nothing_is_said_of_a_scheduler_that_equals_the_configured_one(imported, tmp_path):
    shift = Shift()
    assert folder.read_schedule(imported) == Schedule(shift)
    model = begin(imported, tmp_path / "run", imported, shift)
    assert model_folder.describe_scheduler(model, shift) is None


def test_a_start_that_does_not_exist(imported, tmp_path):
    with pytest.raises(ValueError, match="nowhere is neither a run"):
        begin(imported, tmp_path / "run", tmp_path / "nowhere")
