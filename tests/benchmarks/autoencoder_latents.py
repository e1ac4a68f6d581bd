"""How well a small diffusion model learns the latents of several autoencoders, trained in the same way on each.

    python -m tests.benchmarks.autoencoder_latents IMAGES LPIPS OUT STEPS RUN [RUN...]

IMAGES is the folder that `autoencoder_images` wrote, LPIPS a folder of weights, and each RUN a trained autoencoder,
such as "mixed" and "aligned" of `autoencoder_terms`. A transformer of 4 layers is trained for STEPS updates on the
normalised latents of 128 x 128 crops of training images, whose caption is the kind of the image. The table shows:

- the validation loss on held-out crops. A tenth of the near-duplicate groups is held out; crops of one photograph that
  overlap little count as different, so these are new crops and not always new scenes;
- the Fréchet distance of samples to crops of unseen images, in features of VGG16 (relu5_3, averaged over positions);
- the same distance of reconstructions of these unseen crops, and of crops of the training images: what a perfect model
  of the latents, and of the images, would reach.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_pipeline.funnel import Table
from data_pipeline.samples.cache import Cache
from data_pipeline.selection.index import INDEX
from experiments import demo
from qi2_jax import sharding
from qi2_jax.config import loading
from qi2_jax.config.parsing import parse
from qi2_jax.evaluation.perceptual import Perceptual, frechet_distance
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.pixels import over_white
from qi2_jax.runs import model_folder, paths
from qi2_jax.tasks.transformer.config import model_config_for
from qi2_jax.tasks.transformer.task import train_transformer
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import data, encode, reports
from qi2_jax.workflows.config import DemoExperiment

SIDE = 128  # pixels of a crop
CROPS = 512  # of each kind, of the training images; of the others as many samples are drawn
CAPTIONS = {"photographs": "a photograph", "text": "a page of text"}


def experiment(steps: int) -> DemoExperiment:
    """The demo's transformer with 4 layers, for crops in RGB and latents of a given autoencoder."""
    config = demo.get_config()
    config.vae.update(channels=3)
    config.vae.model.update(in_channels=3, out_channels=3)
    config.data.update(sides=(SIDE,), ratios=("1:1",), channels=3, held_out=0.1)
    config.data.thresholds.min_side = SIDE // 2
    config.transformer.update(batch_sizes=(32,), ema_decay=0.995, ema_ramp=True)
    config.transformer.model.layers = 4
    config.transformer.mesh = dict(data=1, fsdp=1, tensor=1)
    config.transformer.validation.samples = 128
    config.transformer.train.steps = steps
    config.transformer.optimizer.update(lr=2e-3, decay_steps=steps)
    return parse(DemoExperiment, loading.to_dict(config))


def crops(images: Path, kind: str, count: int, seed: int) -> list[np.ndarray]:
    """Crops at random places of random images of a kind, in RGB."""
    rng = np.random.default_rng(seed)
    found = [over_white(Image.open(path)) for path in sorted((images / kind).glob("*.png"))]
    made = []
    for _ in range(count):
        image = found[rng.integers(len(found))]
        left, top = rng.integers(image.width - SIDE + 1), rng.integers(image.height - SIDE + 1)
        made.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    return made


def write_source(images: Path, folder: Path) -> None:
    """Writes crops of the training images with their captions."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for kind, caption in CAPTIONS.items():
            for number, crop in enumerate(crops(images / "train", kind, CROPS, seed=0)):
                name = f"{kind}-{number:04d}.png"
                Image.fromarray(crop).save(folder / name)
                lines.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def train(vae: Path, records: Path, out: Path, steps: int) -> Path:
    """Trains the transformer on the latents of an autoencoder; returns its run."""
    config = experiment(steps)
    run = out / paths.TRANSFORMER
    model = run / paths.MODEL
    model_folder.make_encoder(config.encoder, model)
    shutil.copytree(vae, model / "vae", dirs_exist_ok=True)
    encode.encode(config, records, records / INDEX, model, out / paths.SAMPLES)
    samples = Cache(out / paths.SAMPLES)
    shape = model_config_for(config.transformer, samples)
    model_folder.finish(model, shape, config.transformer.timesteps.shift, "")
    train_transformer(config, samples, run)
    return run


def features(network: Perceptual, images: list[np.ndarray]) -> np.ndarray:
    """Features of VGG16, in batches."""
    batches = [np.stack(images[start : start + 32]) for start in range(0, len(images), 32)]
    return np.concatenate([network(batch, batch)[1] for batch in batches])


def main(images: Path, lpips: Path, out: Path, steps: int, runs: list[Path]) -> None:
    source = out / "source"
    if not source.is_dir():
        write_source(images, source)
    data.prepare(experiment(steps).data, out, source, reports.ignore)
    network, half = Perceptual(lpips), CROPS // 2
    unseen = [crop for kind in CAPTIONS for crop in crops(images / "unseen", kind, half, seed=1)]
    real = features(network, unseen)
    seen = [crop for kind in CAPTIONS for crop in crops(images / "train", kind, half, seed=2)]
    table = Table("diffusion", ("autoencoder", "validation loss", "samples", "reconstructions", "training images"))
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    for autoencoder in runs:
        run = train(autoencoder / paths.MODEL / "vae", out / "records", out / autoencoder.name, steps)
        losses = [line["validation_loss"] for line in metrics.read(run / metrics.FILE) if "validation_loss" in line]
        pipeline = Pipeline.load(run, dtype=jnp.float32, mesh=mesh)
        prompts = [caption for caption in CAPTIONS.values() for _ in range(half)]
        drawn = pipeline.in_batches(prompts, sizes=[(SIDE, SIDE)] * len(prompts), batch_size=64, steps=20)
        samples = [np.asarray(over_white(Image.fromarray(image))) for image in drawn]
        rebuilt = [pipeline.decode(pipeline.encode(Image.fromarray(image))) for image in unseen]
        shown = [np.concatenate(samples[start : start + 12], axis=1) for start in (0, 12, half, half + 12)]
        Image.fromarray(np.concatenate(shown)).save(out / f"{autoencoder.name}.png")
        distances = (f"{frechet_distance(features(network, some), real):.2f}" for some in (samples, rebuilt, seen))
        table.add_row(autoencoder.name, f"{losses[0]:.3f} -> {losses[-1]:.3f}", *distances)
        print(table, flush=True)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:4]]
    main(*folders, int(sys.argv[4]), [Path(argument) for argument in sys.argv[5:]])
