"""Short runs of the demo's transformer on random latents, from any start."""

import numpy as np

from data_pipeline.samples.cache import Cache
from data_pipeline.samples.encoding import preprocessing
from data_pipeline.samples.schema import Sample, Text
from qi2_jax.inference import encoders
from qi2_jax.runs import locating
from qi2_jax.tasks.transformer import start, task
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows.config import load_experiment
from tests import tiny_pipeline
from tests.caches import write_cache

TINY = "experiments/demo.py:tiny"
OVERRIDES = (
    "transformer.model.head_width=16",
    "transformer.model.rope_dims=(4,6,6)",
    "transformer.mesh.data=1",
    "transformer.mesh.tensor=1",
    "transformer.batch_sizes=(4,)",
    "transformer.validation.samples=4",
    "transformer.checkpoint.every=2",
    "transformer.checkpoint.keep=100",
)
ADAPTER = (*OVERRIDES, "transformer.lora.rank=4", "transformer.lora.alpha=8.0", "transformer.optimizer.warmup=2")


def make_samples(path, model):
    """Six samples of random latents, as if the encoders of a model folder had made them."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    made = [
        (64, Sample(draw(*((4, 4), (2, 6))[i % 2], tiny_pipeline.LATENT_CHANNELS), (Text(draw(5, 16), (5,)),)))
        for i in range(6)
    ]
    data = load_experiment(TINY, OVERRIDES).data
    write_cache(path, made, Text(draw(2, 16), (2,)), preprocessing(data) | encoders.digests(model))
    return Cache(path)


def train(samples, out, source, steps, overrides=OVERRIDES, model=None, restart=False):
    """Trains a run as `qi2 train --start SOURCE --model MODEL` does, and returns its folder."""
    given = [*overrides, f"transformer.start.folder={source}", f"transformer.train.steps={steps}"]
    config = load_experiment(TINY, given)
    task.train_transformer(
        config,
        samples,
        out,
        restart=restart,
        base=model,
        prepare=lambda: start.prepare_model_folder(config.transformer, samples, model, out),
    )
    return out


def weights_of(path, item="ema"):
    """{our name: array} of the transformer that a path holds, adapters merged."""
    return {
        name: weight.read(dtype=np.float32)
        for name, weight in locating.locate(path).weights("transformer", item).items()
    }


def losses(run):
    """The validation losses of a run, in order."""
    return [line["validation_loss"] for line in metrics.read(run / "metrics.jsonl") if "validation_loss" in line]
