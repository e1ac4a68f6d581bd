"""Helpers for tests: real processes that train a tiny transformer on pairs and edits, and readers of their runs.

The runs have a mesh of 8 fake devices and two batches per update, each read as two microbatches, so a step takes every
path of the code.
"""

import dataclasses
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipeline.funnel import Tally
from data_pipeline.samples import cache
from data_pipeline.samples.encoding import preprocessing
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.inference import encoders
from qi2_jax.interop.stored_weights import STEM
from qi2_jax.models.vae import VAE
from qi2_jax.runs import model_folder
from qi2_jax.tasks.transformer import task
from qi2_jax.tasks.transformer.config import model_config_for
from qi2_jax.training.checkpoints import contents
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = "experiments/demo.py:tiny"
STEPS, EVERY = 12, 4
CHANNELS, TEXT_WIDTH = 8, 16
OVERRIDES = (
    "data.mixture.tasks=(1, 1)",
    "transformer.batch_sizes=(16,)",
    "transformer.images_per_device=(2,)",
    "transformer.batches_per_update=2",
    "transformer.model.layers=1",
    "transformer.mesh.data=4",  # without `tensor`, whose many sums are slow between processes
    "transformer.mesh.tensor=1",
    "transformer.validation.every=8",
    "transformer.validation.samples=8",
    "transformer.train.sinks=()",
    "transformer.samples.every=0",
    "transformer.samples.count=1",
    "transformer.samples.steps=2",
    "transformer.optimizer.warmup=2",  # so that parameters move
    "transformer.checkpoint.keep=100",
)
# Grids and TensorBoard, which most tests do not need and every start would pay for.
DRAWN = ("transformer.train.sinks=('tensorboard',)", "transformer.samples.every=8")
# Prefixes of metrics that differ between equal runs.
RATES = ("images_per_second", "tokens_per_second", "slots_per_second", "model_tflops_per_second_per_chip")
VARYING = ("time/", "memory/", "goodput", *RATES)
PATIENCE = 300.0  # seconds
# `qi2` that waits for a signal when it has logged a step, so that a test that sends one is never too late.
WAITING = """
import time
from qi2_jax.cli import main
from qi2_jax.runtime import signals
from qi2_jax.training.run import Run

log = Run.log
def log_and_wait(self, step):
    log(self, step)
    while step == {step} and not signals.received():
        time.sleep(0.01)
Run.log = log_and_wait
main.main()
"""


def write_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes a model folder with a random autoencoder for sample grids, and without a text encoder."""
    config = dataclasses.replace(load_experiment(EXPERIMENT).vae.model, latent_channels=CHANNELS)
    like = jax.eval_shape(lambda: VAE(config, key=jax.random.key(0)))
    rng = np.random.default_rng(1)
    vae = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(leaf.dtype), like)
    model_folder.save_vae(folder, vae, (0.0,) * CHANNELS, (1.0,) * CHANNELS)
    for name in (f"text_encoder/{STEM}.safetensors", "text_encoder/config.json", "processor/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


def finish_model(samples: pathlib.Path, folder: pathlib.Path) -> None:
    config = load_experiment(EXPERIMENT, OVERRIDES).transformer
    model_folder.finish(folder, model_config_for(config, cache.Cache(samples)), config.timesteps.shift)


def write_samples(
    folder: pathlib.Path, model: pathlib.Path, spoil: Callable[[int], bool] = lambda index: False
) -> None:
    """Writes twelve pairs and eight edits, four per file. Samples whose index `spoil` accepts are not finite."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def sample(index: int, conditions: int) -> tuple[int, Sample]:
        grid = ((4, 4), (2, 6), (6, 2))[index % 3]
        lengths = tuple(rng.integers(2, 5, conditions + 1).tolist())
        texts = tuple(Text(draw(sum(lengths), TEXT_WIDTH), lengths) for _ in range(2))
        sources = tuple(draw(*grid, CHANNELS) for _ in range(conditions))
        latents = draw(*grid, CHANNELS) * (np.float32("nan") if spoil(index) else 1)
        return 64, Sample(latents, texts, sources, texts[0] if conditions else None)

    data = load_experiment(EXPERIMENT, OVERRIDES).data
    cache.begin(folder, preprocessing(data) | encoders.digests(model))
    made = [sample(index, 0) for index in range(12)] + [sample(index, 1) for index in range(12, 20)]
    units = len(made) // 4
    for unit in range(units):
        cache.write_unit(folder, unit, made[4 * unit : 4 * unit + 4], Tally())
    cache.finish(folder, units, Text(draw(2, TEXT_WIDTH), (2,)))


def command(data: pathlib.Path, out: pathlib.Path, *overrides: str) -> list[str]:
    """The command that trains on the samples and the model in a folder."""
    return [
        *(sys.executable, "-m", "qi2_jax", "train", EXPERIMENT),
        *("--samples", str(data / "samples"), "--model", str(data / "model"), "--out", str(out)),
        *(*OVERRIDES, f"transformer.train.steps={STEPS}", f"transformer.checkpoint.every={EVERY}"),
        *overrides,
    ]


class Done(NamedTuple):
    """Exit status and output of a process."""

    status: int
    text: str


class Started:
    """A running process. Its output goes to a file, so it never waits for a reader."""

    def __init__(self, arguments: Sequence[str]):
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(arguments, stdout=self._output, stderr=subprocess.STDOUT, cwd=ROOT)

    def printed(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Waits for a condition that the process fulfils before it ends."""
        end = time.monotonic() + PATIENCE
        while not condition():
            # Asked again after the end, because a process may fulfil it and end between the two calls.
            assert self.process.poll() is None or condition(), f"ended too early:\n{self.printed()}"
            assert time.monotonic() < end, f"did not get there:\n{self.printed()}"
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def done(self, seconds: float = PATIENCE) -> Done:
        """Waits for the end."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end within {seconds} s:\n{self.printed()}") from None
        return Done(self.process.returncode, self.printed())


def start(data: pathlib.Path, out: pathlib.Path, *overrides: str, wait_at: int | None = None) -> Started:
    """Starts a run. With `wait_at`, it goes on after this step only when it has received a signal."""
    python, *rest = command(data, out, *overrides)
    return Started([python, *rest] if wait_at is None else [python, "-c", WAITING.format(step=wait_at), *rest[2:]])


def run(data: pathlib.Path, out: pathlib.Path, *overrides: str) -> str:
    """Runs to the end, which must be a success."""
    done = start(data, out, *overrides).done()
    assert done.status == 0, done.text[-3000:]
    return done.text


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(program: str, *arguments: str | pathlib.Path) -> list[Started]:
    """Two processes of a program. Its arguments are the process index, a free port, and `arguments`."""
    port = free_port()
    return [Started([sys.executable, "-c", program, index, port, *map(str, arguments)]) for index in "01"]


def printed_by_two(program: str, *arguments: str | pathlib.Path) -> list[str]:
    """The output of both processes, which must succeed."""
    done = [process.done() for process in start_two(program, *arguments)]
    assert [status for status, _ in done] == [0, 0], "\n".join(text[-3000:] for _, text in done)
    return [text for _, text in done]


def start_several(
    count: int, data: pathlib.Path | Sequence[pathlib.Path], out: pathlib.Path, *more: str
) -> list[Started]:
    """The same run in several processes, each of which may have its own copy of the data."""
    meeting = f"127.0.0.1:{free_port()}"
    own = [data] * count if isinstance(data, pathlib.Path) else data
    return [
        start(own[i], out, *more, f"--processes={count}", f"--process={i}", f"--coordinator={meeting}")
        for i in range(count)
    ]


def run_several(count: int, data: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    done = [process.done() for process in start_several(count, data, out, *more)]
    assert [status for status, _ in done] == [0] * count, "\n".join(text[-3000:] for _, text in done)
    return [text for _, text in done]


def logged(out: pathlib.Path) -> dict[int, dict[str, float]]:
    """The metrics of logged steps by step, without those that differ between equal runs."""
    path = out / metrics.FILE
    lines = [line for line in metrics.read(path) if "loss" in line] if path.exists() else []
    return {int(line["step"]): {k: v for k, v in line.items() if not k.startswith(VARYING)} for line in lines}


def validated(out: pathlib.Path) -> dict[int, dict[str, float]]:
    """The metrics of validations by step."""
    return {int(line["step"]): line for line in metrics.read(out / metrics.FILE) if "validation_loss" in line}


def leaves(out: pathlib.Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Parameters, EMA and optimizer state in a checkpoint, by name."""
    return {
        f"{item}/{name}": weight.read()
        for item in ("model", "ema", "optimizer")
        for name, weight in contents.weights(out / "checkpoints" / str(step), item).items()
    }


def assert_equal(out: pathlib.Path, expected: pathlib.Path, step: int = STEPS) -> None:
    """Asserts the same losses, validations, parameters, EMA and optimizer state, bit for bit."""
    assert logged(out) == {known: line for known, line in logged(expected).items() if known in logged(out)}
    assert validated(out) == {known: line for known, line in validated(expected).items() if known in validated(out)}
    wanted = leaves(expected, step)
    for name, leaf in leaves(out, step).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def assert_close(out: pathlib.Path, expected: pathlib.Path, step: int = STEPS, limit: float = 1e-5) -> None:
    """Asserts the same up to rounding, and exactly the same batches."""
    for lines, others in ((logged(out), logged(expected)), (validated(out), validated(expected))):
        for known in lines.keys() & others.keys():
            for name, value in lines[known].items():
                away = 1e-12 if name.startswith("batch/") else limit * max(1.0, abs(others[known][name]))
                assert abs(value - others[known][name]) <= away, (known, name, value, others[known][name])
    wanted = leaves(expected, step)
    for name, leaf in leaves(out, step).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=0, atol=limit, err_msg=name)


def mixture_of(data: pathlib.Path):
    """The mixture of a run, as a single process reads it."""
    config = load_experiment(EXPERIMENT, OVERRIDES)
    return task.Mixture.of_cache(
        cache.Cache(data / "samples"),
        config.data.shares,
        lambda key, layout: (2, 8),
        seed=config.transformer.seed,
        dropout=config.transformer.dropout,
        local_rows=range,
    )


def begun_from(out: pathlib.Path, source: pathlib.Path, step: int) -> pathlib.Path:
    """A copy of a run at one of its checkpoints."""
    shutil.copytree(source / "checkpoints" / str(step), out / "checkpoints" / str(step))
    shutil.copyfile(source / "config.json", out / "config.json")
    return out
