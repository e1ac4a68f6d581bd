"""The demo: a few captioned images become a tiny model that reproduces them, exported to diffusers.

Work that an interrupted call finished is not repeated.
"""

import dataclasses
import logging
import pathlib
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from data_pipeline.funnel import Table
from data_pipeline.loading.crops import SelectedImages
from data_pipeline.samples.cache import Cache
from data_pipeline.selection.index import INDEX
from qi2_jax import sequence, sharding
from qi2_jax.config import recorded
from qi2_jax.config.changes import is_changeable, is_within
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.pixels import to_pixels
from qi2_jax.runs import model_folder, paths
from qi2_jax.runtime import lock
from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.tasks.autoencoder.config import check_autoencoder
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.tasks.transformer.config import check_transformer, model_config_for
from qi2_jax.tasks.transformer.task import train_transformer
from qi2_jax.training import restarting
from qi2_jax.training.checkpoints import files
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import data, encode, job_folder, reports, results
from qi2_jax.workflows.config import CompareConfig, DemoExperiment, ExpectConfig, SampleConfig
from qi2_jax.workflows.data import Caption
from qi2_jax.workflows.export import NOT_EXPORTED, export
from qi2_jax.workflows.reports import Show
from qi2_jax.workflows.verify import check_installed, compare

log = logging.getLogger(__name__)


def run(
    config: DemoExperiment,
    out: pathlib.Path,
    source: pathlib.Path | None = None,
    *,
    restart: bool = False,
    show: Show = reports.ignore,
) -> dict[str, Any]:
    """Makes a trained model and a diffusers folder from a folder of captioned images.

    Args:
      config: see `experiments/demo.py`.
      out: folder that receives everything: `job.json` (the config), `records/`, `vae/`, `samples/`, the run
        `transformer/`, the export `diffusers/`, `samples.png` and `report.json`.
      source: images with `.txt` captions, or with a `metadata.jsonl`; None: the embedded demo set.
      restart: see `loop.train`.
      show: function that draws the reports of all steps.

    Returns:
      The metrics of `report.json`.

    Raises:
      ValueError: if `out` was created from another source or config, no image is left to train on, or a metric misses
        `config.expect`.
    """
    if source is not None and not source.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    if not job_folder.is_usable(out, paths.JOB, config.compilation_cache):
        raise ValueError(f"{out} contains files that no job made; choose an empty or new folder")
    check(config)
    model_folder.check_encoder(config.encoder, out / paths.TRANSFORMER / paths.MODEL)
    with lock.hold(out):
        return _run(config, out, source, restart, show)


def check(config: DemoExperiment) -> None:
    """Checks a config against this machine.

    Raises:
      ValueError: naming what a later step would refuse.
    """
    check_autoencoder(config.vae)
    check_transformer(config)
    config.encode.check()
    if config.compare.images:
        try:
            check_installed()
        except ValueError as error:
            raise ValueError(f"{error}, or skip the comparison with compare.images=0") from None


def may_change(out: pathlib.Path) -> Callable[[str], bool]:
    """Whether a key may differ from the recorded config: no result depends on it, or none exists yet."""
    model = out / paths.TRANSFORMER / paths.MODEL
    if files.steps(out / paths.TRANSFORMER / paths.CHECKPOINTS):
        return lambda key: is_changeable(DemoExperiment, key)
    if files.steps(out / paths.VAE / paths.CHECKPOINTS):
        return lambda key: is_within(key, "transformer") or is_changeable(DemoExperiment, key)
    made = ("source", "encoder") if (model / "text_encoder").exists() else ("source",)
    return lambda key: not any(is_within(key, group) for group in made)


@dataclasses.dataclass(frozen=True)
class _Generated:
    """The images that the trained model generates from the captions.

    Attributes:
      captions: captions, and their images as generated.
      originals, rebuilt: training images by number, as they are and as the autoencoder reconstructs them.
      is_nearest: whether the nearest training image is the caption's, for each caption.
    """

    pipeline: Pipeline
    captions: Sequence[Caption]
    images: Sequence[UInt8[np.ndarray, "_ _ c"]]
    originals: dict[int, UInt8[np.ndarray, "H W c"]]
    rebuilt: dict[int, UInt8[np.ndarray, "H W c"]]
    is_nearest: Sequence[bool]


def _run(
    config: DemoExperiment, out: pathlib.Path, source: pathlib.Path | None, restart: bool, show: Show
) -> dict[str, Any]:
    started = time.monotonic()
    typed = {"source": str(source.absolute()) if source else "demo set", **config.as_typed}
    restarting.check(out / paths.TRANSFORMER, restart=restart)  # before another config is recorded
    recorded.claim(out / paths.JOB, typed, may_change(out))
    log.info("1 data: ingest, filter, bucket")
    images = data.prepare(config.data, out, source, show)
    captions = data.captions_of(images)
    samples = _train(config, images, out, restart, show)
    log.info("5 generate an image for every caption")
    generated = _generate(config.sample, captions, images, samples, out)
    log.info("6 export and compare with PyTorch")
    difference = _export_and_compare(config.compare, generated, out)
    figures = {
        "pictures": len(images),
        "captions": len(captions),
        "sampled_captions": len(generated.captions),
        "autoencoder_psnr": _psnr(generated),
        **_losses(out / paths.TRANSFORMER),
        "samples_nearest_to_own_image": float(np.mean(generated.is_nearest)) if len(images) > 1 else None,
        "largest_difference_to_pytorch": difference,
        "minutes": (time.monotonic() - started) / 60,
        "peak_memory_gib": _peak_memory_gib(),
    }
    write_json_atomic(out / "report.json", figures)
    show(_table(figures, out))
    check_expected(figures, config.expect)
    return figures


def _train(config: DemoExperiment, images: SelectedImages, out: pathlib.Path, restart: bool, show: Show) -> Cache:
    """Trains the autoencoder, encodes the samples, and trains the transformer on them; returns the samples."""
    run_folder = out / paths.TRANSFORMER
    model = run_folder / paths.MODEL
    log.info("2 autoencoder")
    model_folder.make_encoder(config.encoder, model)
    train_vae(config.vae, images, out / paths.VAE, model, held_out=config.data.held_out, restart=restart)
    log.info("3 encode: latents and text features, once")
    encoded = encode.encode(config, out / "records", out / "records" / INDEX, model, out / paths.SAMPLES)
    assert encoded is not None, "the demo is one process"
    show(encoded.table())
    samples = Cache(out / paths.SAMPLES)
    shape = model_config_for(config.transformer, samples)
    model_folder.finish(model, shape, config.transformer.timesteps.shift, config.transformer.start.folder)
    log.info("4 transformer")
    train_transformer(config, samples, run_folder, restart=restart)
    return samples


def _generate(
    config: SampleConfig, captions: Sequence[Caption], images: SelectedImages, samples: Cache, out: pathlib.Path
) -> _Generated:
    """Generates an image for every caption, and draws them beside the originals as `samples.png`."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    pipeline = Pipeline.load(out / paths.TRANSFORMER, dtype=jnp.float32, mesh=mesh)
    captions = captions[: config.captions or None]
    texts = [caption.text for caption in captions]
    sizes = [(caption.width, caption.height) for caption in captions]
    batches = pipeline.in_batches(
        texts, sizes=sizes, batch_size=config.batch_size, steps=config.steps, seed=config.seed
    )
    generated = list(tqdm(batches, total=len(captions), desc="sample", unit="image", dynamic_ncols=True))
    targets = [caption.image for caption in captions]
    originals = {index: images[index] for index in set(targets)}
    numbers = {images.chosen[index].index: index for index in originals}
    rebuilt = {}
    for sample in (sample for stream in samples.streams for sample in stream if sample.record in numbers):
        latents = (
            sample.latents if sample.target_pixels is None else pipeline.encode(Image.fromarray(sample.target_pixels))
        )
        rebuilt[numbers[sample.record]] = pipeline.decode(latents)
    triples = [(originals[index], rebuilt[index], image) for index, image in zip(targets, generated, strict=True)]
    results.draw(out / "samples.png", texts, triples, ("original", "autoencoder", "sample"))
    nearest = results.is_nearest(generated, images, targets)
    return _Generated(pipeline, captions, generated, originals, rebuilt, nearest)


def _export_and_compare(config: CompareConfig, generated: _Generated, out: pathlib.Path) -> int | None:
    """The largest difference of a pixel to diffusers, of 255; None if nothing is compared."""
    if generated.pipeline.transformer.config.attention != sequence.BLOCK_CAUSAL:
        log.info("%s, nothing is compared", NOT_EXPORTED)
        return None
    export(out / paths.TRANSFORMER, out / "diffusers")
    captions = generated.captions[: config.images]
    if not captions:
        return None
    texts = [caption.text for caption in captions]
    sizes = [(caption.width, caption.height) for caption in captions]
    both = compare(generated.pipeline, out / "diffusers", texts, sizes, steps=config.steps)
    for index, (ours, theirs) in enumerate(zip(both.ours, both.theirs, strict=True)):
        Image.fromarray(np.concatenate([ours, theirs], axis=1)).save(out / f"jax_and_pytorch_{index}.png")
    return both.largest_difference


def _psnr(generated: _Generated) -> float:
    """The autoencoder's PSNR in decibels over the training images of the captions."""
    errors = []
    for index, original in generated.originals.items():
        rebuilt = to_pixels(Image.fromarray(generated.rebuilt[index]), 3)
        errors.append(np.mean((to_pixels(Image.fromarray(original), 3) - rebuilt) ** 2))
    return float(10 * np.log10(4 / np.mean(errors)))


def _losses(run_folder: pathlib.Path) -> dict[str, float]:
    lines = metrics.read(run_folder / metrics.FILE)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return {"validation_loss_before": losses[0], "validation_loss_after": losses[-1]}


def _peak_memory_gib() -> float:
    """An upper bound: the sum of the peaks of this process and of its largest child, which runs PyTorch."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20


def check_expected(figures: dict[str, Any], expect: ExpectConfig) -> None:
    """Raises a ValueError that names every metric which misses what is expected."""
    nearest, difference = figures["samples_nearest_to_own_image"], figures["largest_difference_to_pytorch"]
    problems = []
    if nearest is not None and nearest < expect.nearest_to_own:
        problems.append(
            f"only {nearest:.0%} of the generated images are nearest to their own image, less than "
            f"expect.nearest_to_own={expect.nearest_to_own}; train a larger model or longer in a new --out "
            "(transformer.model; transformer.train.steps with optimizer.decay_steps), or lower the expectation"
        )
    if difference is not None and difference > expect.difference_to_pytorch:
        problems.append(f"diffusers generates different images, by up to {difference} of 255")
    if problems:
        raise ValueError("; ".join(problems))


def _table(figures: dict[str, Any], out: pathlib.Path) -> Table:
    nearest, difference = figures["samples_nearest_to_own_image"], figures["largest_difference_to_pytorch"]
    before, after = figures["validation_loss_before"], figures["validation_loss_after"]
    rows = {
        "images, captions": f"{figures['pictures']}, {figures['captions']}",
        "autoencoder PSNR": f"{figures['autoencoder_psnr']:.1f} dB",
        "validation loss, before -> after": f"{before:.3f} -> {after:.3f}",
        "generated images nearest to their own image": "n/a (one image)" if nearest is None else f"{nearest:.0%}",
        "largest difference to PyTorch": "not compared" if difference is None else f"{difference} of 255",
        "time of this call": f"{figures['minutes']:.1f} min",
        "peak memory, at most": f"{figures['peak_memory_gib']:.1f} GiB",
        "original, autoencoder, generated": str(out / "samples.png"),
    }
    if difference is not None:
        rows["JAX beside PyTorch"] = str(out / "jax_and_pytorch_0.png")
    if (out / "diffusers").is_dir():
        rows["diffusers folder"] = str(out / "diffusers")
    table = Table("result", ("", "this job"))
    for row in rows.items():
        table.add_row(*row)
    return table
