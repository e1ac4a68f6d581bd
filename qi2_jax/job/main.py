"""Runs a whole job, step by step; what an earlier, interrupted run finished is not done again."""

import json
import pathlib
import resource
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from qi2_jax import config as configs
from qi2_jax import runs, sharding
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import folder
from qi2_jax.job import data, encode, models, results, stages
from qi2_jax.job.verify import compare
from qi2_jax.pipeline import Pipeline, decode_latents, to_image, to_pixels
from qi2_jax.training import loop, metrics

# Of a job that was begun, only the last training and what follows it may change.
MAY_CHANGE = (*(f"transformer.{key}" for key in loop.MAY_CHANGE), "sample.", "compare.", "data.workers")


def run(config: Any, out: pathlib.Path, source: pathlib.Path | None = None) -> dict[str, Any]:
    """From a folder of captioned images to a trained model and a diffusers pipeline.

    Args:
      config: see `experiments/demo.py`.
      out: receives everything: `job.json` (what was asked for), `records/`, `vae/`, `samples/`, the run
        `transformer/` and the folder `diffusers/`, `samples.png`, `report.json`.
      source: images beside `.txt` captions, or with a `metadata.jsonl`; None: the embedded demo set.

    Returns:
      The figures of the report.

    Raises:
      ValueError: if `out` was begun with another source or config, or no picture is left to train on.
    """
    begun, console = time.monotonic(), Console()
    if source is not None and not source.is_dir():
        raise ValueError(f"{source} is not a folder of images")
    if not (out / "job.json").is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something that no job made; choose an empty or new folder")
    out.mkdir(parents=True, exist_ok=True)
    asked = {"source": str(source.absolute()) if source else "demo set", **configs.to_dict(config)}
    configs.claim(out / "job.json", asked, MAY_CHANGE)
    run_folder, dtype = out / stages.TRANSFORMER, stages.DTYPES[config.encode_dtype]
    model = run_folder / runs.MODEL

    console.rule("1 data: ingest, filter, bucket")
    pictures = data.prepare(config.data, out, source, console)
    captions = data.captions(pictures)

    console.rule("2 autoencoder")
    models.make_encoder(config.encoder, model)
    stages.train_vae(config.vae, pictures, out / "vae", model)

    console.rule("3 encode: latents and text features, once")
    samples = encode.encode(out / "samples", model, pictures, captions, dtype)
    models.finish(
        model, stages.transformer_config(config.transformer, samples), Shift(**config.transformer.timesteps.shift)
    )

    console.rule("4 transformer")
    stages.train_transformer(config.transformer, samples, run_folder)

    console.rule("5 sample every caption")
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    pipeline = Pipeline.load(run_folder, dtype=jnp.float32, mesh=mesh)
    texts = [caption.text for caption in captions]
    sizes = [(caption.width, caption.height) for caption in captions]
    images = pipeline(
        texts,
        sizes=sizes,
        steps=config.sample.steps,
        seed=config.sample.seed,
        progress=lambda steps: tqdm(steps, desc="sample", unit="step", dynamic_ncols=True),
    )
    originals = list(pictures)
    owners = [caption.picture for caption in captions]
    first = [owners.index(picture) for picture in range(len(originals))]
    rebuilt = [
        to_image(np.asarray(decode_latents(pipeline.vae, samples[index].latents[None], jnp.float32))[0])
        for index in first
    ]
    own = results.nearest_is_own(images, originals, owners)
    triples = [(originals[i], rebuilt[i], image) for i, image in zip(owners, images, strict=True)]
    results.draw(out / "samples.png", texts, triples, ("original", "autoencoder", "sample"))

    console.rule("6 export and compare with PyTorch")
    exported = out / "diffusers"
    shutil.rmtree(exported, ignore_errors=True)  # ours, from an earlier run
    located = runs.locate(run_folder)
    folder.export_folder(located.model, exported, replace={"transformer": located.weights("transformer")})
    count = min(config.compare.images, len(texts))
    both = compare(pipeline, exported, texts[:count], sizes[:count], steps=config.compare.steps)
    for index, (ours, theirs) in enumerate(zip(both.ours, both.theirs, strict=True)):
        Image.fromarray(np.concatenate([ours, theirs], axis=1)).save(out / f"jax_and_pytorch_{index}.png")

    validation = [
        line["validation_loss"] for line in metrics.read(run_folder / "metrics.jsonl") if "validation_loss" in line
    ]
    error = np.mean(
        [
            np.mean((to_pixels(Image.fromarray(a), 3) - to_pixels(Image.fromarray(b), 3)) ** 2)
            for a, b in zip(originals, rebuilt, strict=True)
        ]
    )
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {
        "pictures": len(pictures),
        "captions": len(captions),
        "autoencoder_psnr": float(10 * np.log10(4 / error)),
        "validation_loss_before": validation[0],
        "validation_loss_after": validation[-1],
        "samples_nearest_to_own_image": float(np.mean(own)),
        "largest_difference_to_pytorch": both.largest_difference,
        "minutes": (time.monotonic() - begun) / 60,
        "peak_memory_gib": peak / 2**20,
    }
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.print(_table(figures, out))
    return figures


def _table(figures: dict[str, Any], out: pathlib.Path) -> Table:
    table = Table(title="result", show_header=False)
    rows = {
        "pictures, captions": f"{figures['pictures']}, {figures['captions']}",
        "autoencoder PSNR": f"{figures['autoencoder_psnr']:.1f} dB",
        "validation loss, before -> after": (
            f"{figures['validation_loss_before']:.3f} -> {figures['validation_loss_after']:.3f}"
        ),
        "samples nearest to their own image": f"{figures['samples_nearest_to_own_image']:.0%}",
        "largest difference to PyTorch": f"{figures['largest_difference_to_pytorch']} of 255",
        "time": f"{figures['minutes']:.1f} min",
        "peak memory of the largest process": f"{figures['peak_memory_gib']:.1f} GiB",
        "original, autoencoder, sample": str(out / "samples.png"),
        "JAX beside PyTorch": str(out / "jax_and_pytorch_0.png"),
        "diffusers pipeline": str(out / "diffusers"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
