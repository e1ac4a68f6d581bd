"""A run that is killed and started again equals one that never stopped; real processes on a mesh of 8 fake devices."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline.cache import write_cache
from data_pipeline.encode import preprocessing
from data_pipeline.samples import Sample, Text
from qi2_jax import config as configs
from qi2_jax import lock
from qi2_jax.training import checkpoint, metrics

STEPS, EVERY = 24, 4


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    folder = tmp_path_factory.mktemp("data") / "samples"
    grids = [(4, 4), (2, 6), (6, 2)]
    made = [
        Sample(draw(*grids[i % 3], 8), (Text(draw(length := int(rng.integers(2, 9)), 16), (length,)),))
        for i in range(11)
    ]
    data = configs.load("experiments/demo.py:tiny").data
    write_cache(folder, ((64, sample) for sample in made), Text(draw(2, 16), (2,)), preprocessing(data))
    return folder


def command(samples: pathlib.Path, out: pathlib.Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "qi2_jax.train", "experiments/demo.py:tiny"),
        *("--samples", str(samples), "--out", str(out)),
        f"transformer.train.steps={STEPS}",
        f"transformer.checkpoint.every={EVERY}",
        *overrides,
    ]


def run(samples: pathlib.Path, out: pathlib.Path, *overrides: str) -> None:
    done = subprocess.run(command(samples, out, *overrides), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def start(samples: pathlib.Path, out: pathlib.Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(command(samples, out, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the process ended before the moment it was to be stopped"
        assert time.monotonic() < end, "the process did not reach the moment it was to be stopped"
        time.sleep(0.005)


def logged(out: pathlib.Path) -> dict[int, dict]:
    path = out / "metrics.jsonl"
    lines = [line for line in metrics.read(path) if "loss" in line] if path.exists() else []
    return {int(line["step"]): {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines}


def leaves(out: pathlib.Path) -> dict[str, np.ndarray]:
    step = out / "checkpoints" / str(STEPS)
    return {
        f"{item}/{name}": weight.read()
        for item in ("model", "ema", "optimizer")
        for name, weight in checkpoint.weights(step, item).items()
    }


@pytest.fixture(scope="module")
def uninterrupted(samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(samples, out, "transformer.checkpoint.keep=100")
    return out


def test_resume_after_kills_equals_an_uninterrupted_run(samples, uninterrupted, tmp_path):
    """Killed once between saves and once while a save is being written, then left to finish."""
    out = tmp_path / "killed"
    process = start(samples, out)
    wait_until(lambda: checkpoint.steps(out / "checkpoints"), process)  # steps go on while a save is written
    process.send_signal(signal.SIGKILL)
    process.wait()

    process = start(samples, out)
    known = set(os.listdir(out / "checkpoints"))
    wait_until(lambda: set(os.listdir(out / "checkpoints")) - known, process)  # a save has begun
    process.send_signal(signal.SIGKILL)
    process.wait()

    run(samples, out)
    assert logged(out) == logged(uninterrupted)
    expected = leaves(uninterrupted)
    for name, leaf in leaves(out).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "mesh", [{"data": 1, "fsdp": 8, "tensor": 1}, {"data": 2, "fsdp": 1, "tensor": 2}], ids=["8_devices", "4_devices"]
)
def test_resume_on_another_mesh_continues_within_rounding(samples, uninterrupted, tmp_path, mesh):
    out, half = tmp_path / "moved", STEPS // 2
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(uninterrupted / "checkpoints" / str(half), out / "checkpoints" / str(half))
    shutil.copyfile(uninterrupted / "config.json", out / "config.json")
    run(samples, out, *(f"transformer.mesh.{axis}={size}" for axis, size in mesh.items()))
    expected = logged(uninterrupted)
    assert sorted(logged(out)) == list(range(half + 1, STEPS + 1))
    for step, line in logged(out).items():
        assert abs(line["loss"] - expected[step]["loss"]) <= 1e-5


def test_sigterm_saves_and_exits_cleanly(samples, uninterrupted, tmp_path):
    out = tmp_path / "terminated"
    process = start(samples, out, "transformer.checkpoint.every=1000")
    wait_until(lambda: max(logged(out), default=0) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    (saved,) = checkpoint.steps(out / "checkpoints")
    assert 2 <= saved < STEPS
    run(samples, out)
    assert logged(out) == logged(uninterrupted)


def test_sigterm_before_the_first_step_exits_cleanly_and_meanwhile_the_folder_is_taken(samples, tmp_path):
    process = start(samples, tmp_path / "run")
    wait_until((tmp_path / "run" / lock.NAME).exists, process)
    wait_until((tmp_path / "run" / lock.NAME).read_text, process)
    with pytest.raises(ValueError, match=f"process {process.pid} of "), lock.hold(tmp_path / "run"):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    with lock.hold(tmp_path / "run"):
        pass


def test_another_config_is_refused_with_the_difference(samples, uninterrupted):
    done = subprocess.run(
        command(samples, uninterrupted, "transformer.optimizer.lr=0.5"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "optimizer.lr: 0.004 -> 0.5" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_names_every_leaf_that_differs(samples, uninterrupted, tmp_path):
    out = tmp_path / "wider"
    shutil.copytree(uninterrupted / "checkpoints" / str(STEPS), out / "checkpoints" / str(STEPS))
    done = subprocess.run(
        command(samples, out, "transformer.model.heads=4", "transformer.model.layers=3"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "model: blocks.attn.q.weight is float32(2, 64, 64), not float32(3, 128, 128)" in done.stderr
    assert "ema: image_in.weight" in done.stderr and "optimizer: " in done.stderr
    assert not (out / "config.json").exists()


def test_a_refused_run_claims_nothing(samples, tmp_path):
    done = subprocess.run(
        command(samples, tmp_path, "transformer.train.steps=1000"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "goes beyond optimizer.decay_steps 800" in done.stderr
    assert not any(path for path in tmp_path.iterdir() if path.name != "model")
