"""Images and captions into samples, once: latents of the autoencoder and features of the condition encoder."""

import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data_pipeline.pictures import Pictures
from data_pipeline.samples import Sample, SampleFolder, Text, write_samples
from qi2_jax import prompts, sharding
from qi2_jax.interop import components
from qi2_jax.interop.weights import STEM
from qi2_jax.job import models
from qi2_jax.job.data import Caption
from qi2_jax.pipeline import encode_images

BATCH = 8


def fingerprint(model: pathlib.Path, pictures: Pictures, captions: Sequence[Caption]) -> dict[str, Any]:
    """What samples depend on: both encoders, the pixels, the captions."""
    return {
        **encoders(model),
        "pictures": pictures.digest,
        "captions": hashlib.sha256(repr(tuple(captions)).encode()).hexdigest(),
    }


def encoders(model: pathlib.Path) -> dict[str, str]:
    """Digests of what makes samples in a model folder: both encoders and the prompts' processor."""
    names = (f"{STEM}.safetensors", "config.json")
    parts = {part: [model / part / name for name in names] for part in ("vae", "text_encoder")}
    parts["processor"] = sorted(path for path in (model / "processor").iterdir() if path.is_file())
    return {part: _digest(*paths) for part, paths in parts.items()}


def _digest(*paths: pathlib.Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def encode(
    out: pathlib.Path, model: pathlib.Path, pictures: Pictures, captions: Sequence[Caption], dtype: Any
) -> SampleFolder:
    """Samples of all captions in `out`; an existing folder made from the same things is used again."""
    made_from = fingerprint(model, pictures, captions)
    try:
        return SampleFolder(out, made_from)
    except ValueError:
        pass  # absent, incomplete, or made from something else: encode again
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    vae, encoder = (models.load(model, name, mesh, dtype) for name in ("vae", "text_encoder"))
    config = components.read_config(model / "text_encoder", "text_encoder")
    processor = prompts.PromptProcessor.from_folder(model / "processor", config)
    # One length for all batches, so that the encoder is compiled once.
    length = max(processor([caption.text]).inputs.input_ids.shape[1] for caption in captions)

    def features(texts: Sequence[str]) -> list[Text]:
        batch = processor([*texts, *[""] * (BATCH - len(texts))], length=length)
        rows = zip(prompts.encode_prompts(encoder, batch), batch.segments, strict=True)
        found = [Text(np.asarray(row, np.float32), tuple(map(len, parts.text))) for row, parts in rows]
        return found[: len(texts)]

    def samples() -> Iterator[Sample]:
        latents = -1, np.zeros(0)
        with tqdm(total=len(captions), desc="encode", unit="sample", dynamic_ncols=True) as bar:
            for start in range(0, len(captions), BATCH):
                batch = captions[start : start + BATCH]
                for caption, text in zip(batch, features([caption.text for caption in batch]), strict=True):
                    if latents[0] != caption.picture:
                        pixels = pictures[caption.picture].astype(np.float32)[None] / 127.5 - 1
                        latents = caption.picture, np.asarray(encode_images(vae, jnp.asarray(pixels), dtype)[0])
                    bar.update()
                    yield Sample(latents[1], text)

    write_samples(out, samples(), features([""])[0], made_from)
    return SampleFolder(out, made_from)
