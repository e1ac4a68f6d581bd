"""The share of a step that is spent outside of the compiled program, at steps of about a second.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.host_overhead [--steps N]

The loop of `qi2 train` runs on random samples: reading and collating them, putting them on the mesh, dispatch, metrics
at every tenth step, watchdog, progress. Each call of the compiled program is waited for, so what the host does between
two of them is not hidden behind the devices' work, as it is in training, where the loop runs two steps ahead: an upper
bound.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np

from data_pipeline.samples.cache import Cache
from data_pipeline.samples.encoding import preprocessing
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.runtime import devices
from qi2_jax.tasks.transformer import task
from qi2_jax.training.compiled import Compiled
from qi2_jax.workflows.config import load_experiment
from tests.caches import write_cache

TEXT, WIDTH, CHANNELS = 64, 256, 64
OVERRIDES = (
    "transformer.train.watchdog_seconds=600.0",
    "transformer.batch_sizes=(32,)",
    "transformer.model.layers=4",
    "transformer.model.heads=8",
    "transformer.optimizer.decay_steps=0",
)


def write_samples(folder: pathlib.Path, data) -> Cache:
    rng = np.random.default_rng(0)

    def text():
        return Text(rng.normal(size=(TEXT, WIDTH)).astype(np.float32), (TEXT,))

    made = [(96, Sample(rng.normal(size=(6, 6, CHANNELS)).astype(np.float32), (text(),))) for _ in range(64)]
    write_cache(folder, made, text(), preprocessing(data))
    return Cache(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    config = load_experiment(
        "experiments/demo.py", (*OVERRIDES, f"transformer.train.steps={parser.parse_args().steps}")
    )
    devices.set_platform(config, (config.transformer.mesh,))
    update = Compiled.__call__
    begun, ended = [], []

    def timed(self, state, frozen, parts, before_each):
        parts = list(parts)
        jax.block_until_ready(parts[0].batch)
        begun.append(time.perf_counter())
        made = update(self, state, frozen, parts, before_each)
        jax.block_until_ready(made)
        ended.append(time.perf_counter())
        return made

    Compiled.__call__ = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        task.train_transformer(config, write_samples(folder / "samples", config.data), folder / "run")
    steps = len(ended) - 1  # from the end of the first to the end of the last
    whole, inside = ended[-1] - ended[0], sum(ended[i] - begun[i] for i in range(1, len(ended)))
    print(f"{whole / steps:.3f} s a step, {inside / steps:.3f} s in the program: {1 - inside / whole:.1%} outside")


if __name__ == "__main__":
    main()
