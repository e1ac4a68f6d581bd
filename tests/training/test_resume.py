"""A run that is killed and resumed equals one that never stopped. Real processes on a mesh of 8 fake devices."""

import os
import shutil
import signal

import pytest

from qi2_jax.runtime import lock
from qi2_jax.training.checkpoints import files
from tests.training import runs_of
from tests.training.runs_of import EVERY, STEPS, begun_from, logged, run, start


def test_resume_after_kills_equals_an_uninterrupted_run(data, uninterrupted, tmp_path):
    """The run is killed between saves and again during a save, and then finishes."""
    out = tmp_path / "killed"
    process = start(data, out)
    process.wait_until(lambda: files.steps(out / "checkpoints"))  # steps go on while a save is written
    process.signal(signal.SIGKILL)
    process.done()

    process = start(data, out)
    known = set(os.listdir(out / "checkpoints"))
    process.wait_until(lambda: set(os.listdir(out / "checkpoints")) - known)  # a save has begun
    process.signal(signal.SIGKILL)
    process.done()

    run(data, out)
    assert sorted(logged(out)) == list(range(1, STEPS + 1))
    runs_of.assert_equal(out, uninterrupted)


@pytest.mark.parametrize(
    "mesh", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 1, "tensor": 2}], ids=["8_devices", "4_devices"]
)
def test_resume_on_another_mesh_continues_within_rounding(data, uninterrupted, tmp_path, mesh):
    out = begun_from(tmp_path / "moved", uninterrupted, 2 * EVERY)
    run(data, out, *(f"transformer.mesh.{axis}={size}" for axis, size in mesh.items()))
    assert sorted(logged(out)) == list(range(2 * EVERY + 1, STEPS + 1))
    runs_of.assert_close(out, uninterrupted)


def test_sigterm_saves_and_exits_cleanly(data, uninterrupted, tmp_path):
    out = tmp_path / "terminated"
    process = start(data, out, "transformer.checkpoint.every=1000", wait_at=2)
    process.wait_until(lambda: max(logged(out), default=0) >= 2)
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGTERM)
    process.wait_until(lambda: "SIGTERM: saved step" in process.printed())  # the save may still be under way
    process.signal(signal.SIGTERM)
    assert process.done().status == 0
    (saved,) = files.steps(out / "checkpoints")
    assert 2 <= saved < STEPS
    run(data, out)
    runs_of.assert_equal(out, uninterrupted)


def test_sigterm_before_the_first_step_exits_cleanly_and_meanwhile_the_folder_is_taken(data, tmp_path):
    out = tmp_path / "run"
    process = start(data, out)
    process.wait_until((out / lock.NAME).exists)
    process.wait_until((out / lock.NAME).read_text)
    with pytest.raises(ValueError, match=f"process {process.process.pid} of "), lock.hold(out):
        pass
    process.signal(signal.SIGTERM)
    assert process.done().status == 0
    with lock.hold(out):
        pass


def test_a_checkpoint_of_another_model_names_every_leaf_that_differs(data, uninterrupted, tmp_path):
    out = tmp_path / "wider"
    shutil.copytree(uninterrupted / "checkpoints" / str(STEPS), out / "checkpoints" / str(STEPS))
    done = start(data, out, "transformer.model.heads=4", "transformer.model.layers=3").done()
    assert done.status == 1
    assert "model: blocks.attn.q.weight is float32(1, 64, 64), not float32(3, 128, 128)" in done.text
    assert "ema: image_in.weight" in done.text and "optimizer: " in done.text
    assert not (out / "config.json").exists()


def test_a_refused_run_claims_nothing(data, tmp_path):
    done = start(data, tmp_path, "transformer.train.steps=1000").done()
    assert done.status == 1 and "beyond optimizer.decay_steps 800" in done.text
    assert not any(path for path in tmp_path.iterdir() if path.name != "model")
