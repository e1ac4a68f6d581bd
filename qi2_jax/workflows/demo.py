"""Runs a whole job, step by step; what an earlier, interrupted run finished is not done again."""

import pathlib
import resource
import time
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline.buckets import Resolutions
from data_pipeline.samples.cache import Cache
from data_pipeline.selection.index import INDEX
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax import sequence, sharding
from qi2_jax.config import loading as configs
from qi2_jax.config import recorded
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.pixels import to_pixels
from qi2_jax.runs import model_folder, paths
from qi2_jax.runtime import lock
from qi2_jax.runtime.atomic import leftovers, write_json_atomic
from qi2_jax.tasks.autoencoder.config import check_vae
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.tasks.transformer.config import check_transformer, transformer_config
from qi2_jax.tasks.transformer.task import train_transformer
from qi2_jax.training import loop, restarting
from qi2_jax.training.checkpoints import manager
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import data, encode, results
from qi2_jax.workflows.export import NOT_EXPORTED, export
from qi2_jax.workflows.verify import check_installed, compare

# Of a job that was begun, only the last training and what follows it may change.
MAY_CHANGE = (
    *(f"transformer.{key}" for key in loop.MAY_CHANGE),
    "sample.",
    "compare.",
    "expect.",
    "data.workers",
    "compilation_cache",
)

LEAST = {"data": {"workers": 0}, "sample": {"batch_size": 1, "steps": 1, "captions": 0, "seed": 0}}


def run(config: Any, out: pathlib.Path, source: pathlib.Path | None = None, *, restart: bool = False) -> dict[str, Any]:
    """From a folder of captioned images to a trained model and a diffusers pipeline.

    Args:
      config: see `experiments/demo.py`.
      out: receives everything: `job.json` (what was asked for), `records/`, `vae/`, `samples/`, the run
        `transformer/` and the folder `diffusers/`, `samples.png`, `report.json`.
      source: images beside `.txt` captions, or with a `metadata.jsonl`; None: the embedded demo set.
      restart: see `loop.train`.

    Returns:
      The figures of the report.

    Raises:
      ValueError: if `out` was begun with another source or config, no picture is left to train on, or a figure is worse
        than `config.expect`.
    """
    if source is not None and not source.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    if not is_ours(out, paths.JOB, config.get("compilation_cache", "")):
        raise ValueError(f"{out} holds something that no job made; choose an empty or new folder")
    check_config(config)
    model_folder.check_encoder(config.encoder, out / paths.TRANSFORMER / paths.MODEL)
    with lock.hold(out):
        return _run(config, out, source, restart)


def is_ours(out: pathlib.Path, mark: str = paths.JOB, compiled: str = "") -> bool:
    """Whether a job may work in `out`: it is missing or empty, or a job was begun there, if only just.

    Args:
      mark: the file with what a job was asked for.
      compiled: the config's `compilation_cache`.
    """
    if (out / mark).is_file() or not out.exists():
        return True
    # Compiled programs: of a start that was refused, or of another process of this one.
    programs = out / compiled
    return out.is_dir() and {*out.iterdir()} <= {out / lock.NAME, programs, *programs.parents, *leftovers(out / mark)}


def _run(config: Any, out: pathlib.Path, source: pathlib.Path | None, restart: bool) -> dict[str, Any]:
    begun, console = time.monotonic(), Console()
    run_folder = out / paths.TRANSFORMER
    model = run_folder / paths.MODEL
    asked = {"source": str(source.absolute()) if source else "demo set", **configs.to_dict(config)}
    restarting.check(run_folder, restart=restart)  # before another config is recorded
    recorded.claim(out / paths.JOB, asked, may_change(out, asked.keys()))

    console.rule("1 data: ingest, filter, bucket")
    pictures = data.prepare(config.data, out, source, console)
    captions = data.captions(pictures)

    console.rule("2 autoencoder")
    model_folder.make_encoder(config.encoder, model)
    train_vae(config.vae, pictures, out / "vae", model, held_out=config.data.held_out, restart=restart)

    console.rule("3 encode: latents and text features, once")
    encoded = encode.encode(config, out / "records", out / "records" / INDEX, model, out / "samples")
    assert encoded is not None, "a job is one process"
    console.print(encoded.table())
    samples = Cache(out / "samples")
    model_folder.finish(
        model, transformer_config(config.transformer, samples), Shift(**config.transformer.timesteps.shift)
    )

    console.rule("4 transformer")
    train_transformer(config, samples, run_folder, restart=restart)

    console.rule("5 sample every caption")
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    pipeline = Pipeline.load(run_folder, dtype=jnp.float32, mesh=mesh)
    drawn = captions[: config.sample.captions or None]
    texts = [caption.text for caption in drawn]
    sizes = [(caption.width, caption.height) for caption in drawn]
    size, seed = config.sample.batch_size, config.sample.seed
    drawing = pipeline.in_batches(texts, sizes=sizes, batch_size=size, steps=config.sample.steps, seed=seed)
    images = list(tqdm(drawing, total=len(drawn), desc="sample", unit="image", dynamic_ncols=True))
    owners = [caption.picture for caption in drawn]
    originals = {picture: pictures[picture] for picture in set(owners)}
    places = {pictures.chosen[picture].index: picture for picture in originals}
    used = (sample for stream in samples.streams for sample in stream if sample.record in places)
    rebuilt = {}
    for sample in used:
        latents = sample.latents if sample.target is None else pipeline.encode(Image.fromarray(sample.target))
        rebuilt[places[sample.record]] = pipeline.decode(latents)
    own = results.nearest_is_own(images, pictures, owners)
    triples = [(originals[i], rebuilt[i], image) for i, image in zip(owners, images, strict=True)]
    results.draw(out / "samples.png", texts, triples, ("original", "autoencoder", "sample"))

    console.rule("6 export and compare with PyTorch")
    count, difference = min(config.compare.images, len(texts)), None
    exportable = pipeline.transformer.config.attention == sequence.BLOCK_CAUSAL
    if exportable:
        export(run_folder, out / "diffusers")
    else:
        console.print(f"{NOT_EXPORTED}, nothing compared")
    if exportable and count:
        both = compare(pipeline, out / "diffusers", texts[:count], sizes[:count], steps=config.compare.steps)
        difference = both.largest_difference
        for index, (ours, theirs) in enumerate(zip(both.ours, both.theirs, strict=True)):
            Image.fromarray(np.concatenate([ours, theirs], axis=1)).save(out / f"jax_and_pytorch_{index}.png")

    validation = [
        line["validation_loss"] for line in metrics.read(run_folder / "metrics.jsonl") if "validation_loss" in line
    ]
    error = np.mean(
        [
            np.mean((to_pixels(Image.fromarray(originals[i]), 3) - to_pixels(Image.fromarray(rebuilt[i]), 3)) ** 2)
            for i in originals
        ]
    )
    # This process and the largest of its children, PyTorch's, as if both had their peaks at once.
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {
        "pictures": len(pictures),
        "captions": len(captions),
        "sampled_captions": len(drawn),
        "autoencoder_psnr": float(10 * np.log10(4 / error)),
        "validation_loss_before": validation[0],
        "validation_loss_after": validation[-1],
        "samples_nearest_to_own_image": float(np.mean(own)) if len(pictures) > 1 else None,
        "largest_difference_to_pytorch": difference,
        "minutes": (time.monotonic() - begun) / 60,
        "peak_memory_gib": peak / 2**20,
    }
    write_json_atomic(out / "report.json", figures)
    console.print(_table(figures, out))
    check(figures, config.expect)
    return figures


def may_change(out: pathlib.Path, keys: Collection[str]) -> tuple[str, ...]:
    """Beginnings of the keys that another call may change: those from which nothing is made yet, never the source."""
    run = out / paths.TRANSFORMER
    if manager.steps(run / paths.CHECKPOINTS):
        return MAY_CHANGE
    if manager.steps(out / "vae" / paths.CHECKPOINTS):
        return (*MAY_CHANGE, "transformer.")
    made = {"source", "encoder"} if (run / paths.MODEL / "text_encoder").exists() else {"source"}
    return tuple(key for key in keys if key not in made)


def check_config(config: Any) -> None:
    """Raises a ValueError for a value that any step would refuse, before the first of them has begun."""
    check_stages(config)
    encode.check(config.encode)
    Resolutions.of_config(config.data)
    Thresholds(**config.data.thresholds)
    for group, keys in LEAST.items():
        for key, at_least in keys.items():
            if config[group][key] < at_least:
                raise ValueError(f"{group}.{key} is {config[group][key]}; it must be at least {at_least}")
    if config.sample.seed >= loop.MAX_SEED:
        raise ValueError(f"sample.seed is {config.sample.seed}; it must be below {loop.MAX_SEED}")
    if config.compare.images < 0 or config.compare.steps < 1:
        raise ValueError(f"compare.images is {config.compare.images}, compare.steps {config.compare.steps}")
    if config.compare.images:
        try:
            check_installed()
        except ValueError as error:
            raise ValueError(f"{error}, or leave the comparison out with compare.images=0") from None


def check(figures: dict[str, Any], expect: Any) -> None:
    """Raises a ValueError that names every figure which is worse than expected."""
    own, difference = figures["samples_nearest_to_own_image"], figures["largest_difference_to_pytorch"]
    problems = []
    if own is not None and own < expect.nearest_to_own:
        problems.append(
            f"only {own:.0%} of the samples are nearest to their own image, less than expect.nearest_to_own="
            f"{expect.nearest_to_own}; train longer or larger in a new --out (transformer.train.steps with "
            "optimizer.decay_steps, transformer.model), or expect less"
        )
    if difference is not None and difference > expect.difference_to_pytorch:
        problems.append(f"diffusers generates other images, up to {difference} of 255 apart")
    if problems:
        raise ValueError("; ".join(problems))


def _table(figures: dict[str, Any], out: pathlib.Path) -> Table:
    table = Table(title="result", show_header=False)
    own, difference = figures["samples_nearest_to_own_image"], figures["largest_difference_to_pytorch"]
    rows = {
        "pictures, captions": f"{figures['pictures']}, {figures['captions']}",
        "autoencoder PSNR": f"{figures['autoencoder_psnr']:.1f} dB",
        "validation loss, before -> after": (
            f"{figures['validation_loss_before']:.3f} -> {figures['validation_loss_after']:.3f}"
        ),
        "samples nearest to their own image": "n/a (one picture)" if own is None else f"{own:.0%}",
        "largest difference to PyTorch": "not compared" if difference is None else f"{difference} of 255",
        "time of this call": f"{figures['minutes']:.1f} min",
        "peak memory, at most": f"{figures['peak_memory_gib']:.1f} GiB",
        "original, autoencoder, sample": str(out / "samples.png"),
    }
    if difference is not None:
        rows["JAX beside PyTorch"] = str(out / "jax_and_pytorch_0.png")
    if (out / "diffusers").is_dir():
        rows["diffusers pipeline"] = str(out / "diffusers")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def check_stages(config: Any) -> None:
    """Checks what both stages read in a config, as far as that is possible without data.

    Raises:
      ValueError: naming a value that training would refuse, now rather than after hours of the stages before.
    """
    model = check_vae(config.vae)
    if config.data.channels != model.in_channels:
        raise ValueError(f"data.channels is {config.data.channels}; the autoencoder reads {model.in_channels}")
    check_transformer(config.transformer, config.data)
