"""Compares generation here with generation by diffusers and PyTorch on the exported folder, from the same noise."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from qi2_jax.evaluation.torch_process import MAX_ERROR_TEXT, missing_packages
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.text import prompts

CODES = {"bfloat16": "BF16", "float32": "F32"}  # safetensors codes of the dtypes of an export
TEXTS, SIZES = ("A lighthouse above the sea at dawn.", "一只红色的狐狸"), ((256, 256), (320, 192))
MAX_PIXEL_DIFFERENCE, MAX_LATENT_ERROR = 1, 1e-4  # of 255; relative
OPTIONS = {"resolution": 1024, "negative": None, "guidance": 1.0, "steps": 20}  # of `Pipeline.denoise`


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of both sides, and their differences.

    Attributes:
      ours, theirs: images, 0..255.
      latent_error: largest difference of the latents before decoding, relative to the largest latent.
      moved: largest difference between the latents and the noise they started as. It is 0 for a transformer that
        predicts nothing, which leaves nothing to compare.
    """

    ours: list[UInt8[np.ndarray, "_ _ c"]]
    theirs: list[UInt8[np.ndarray, "_ _ c"]]
    latent_error: float
    moved: float

    @property
    def largest_difference(self) -> int:
        """The largest difference of a pixel, of 255."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)

    @property
    def is_equal(self) -> bool:
        """Whether both sides generated the same, up to rounding."""
        return self.largest_difference <= MAX_PIXEL_DIFFERENCE and self.latent_error <= MAX_LATENT_ERROR

    def describe(self) -> str:
        """The differences, in one or two lines."""
        text = (
            f"largest difference to diffusers over {len(self.ours)} images: {self.largest_difference} of 255; "
            f"of the latents, relative: {self.latent_error:.1e}"
        )
        if self.moved == 0:
            text += (
                "\nthe transformer predicts nothing yet, as an untrained one does: only the other components were "
                "compared"
            )
        return text


def check_installed() -> None:
    """Raises a ValueError that says what to install if PyTorch or diffusers are missing."""
    if missing := missing_packages():
        raise ValueError(f"a comparison with diffusers needs {missing}; pip install -r requirements-dev.txt")


def compare(
    pipeline: Pipeline,
    exported: pathlib.Path,
    texts: Sequence[str],
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    images: Sequence[Image.Image] = (),
    seed: int = 0,
    **options: Any,
) -> Comparison:
    """Generates an image for every text on both sides, in fp32 and from the same noise; diffusers one by one.

    Args:
      pipeline: pipeline loaded in float32.
      exported: diffusers folder, which a Python process with torch and diffusers reads.
      texts, sizes, images: as in `Pipeline.denoise`.
      seed: seed of the noise.
      options: further arguments of `Pipeline.denoise` that replace those of `OPTIONS`.

    Raises:
      ValueError: if torch or diffusers are not installed, or their process fails.
    """
    check_installed()
    options = OPTIONS | options
    if sizes is None:
        side = options["resolution"]
        size = prompts.resize_condition(images[-1], side).size if images else (side, side)
        sizes = [size] * len(texts)
    noise = _noise(pipeline, sizes, seed)
    longest = max(map(len, noise))
    latents = pipeline.denoise(
        texts,
        sizes=sizes,
        images=images,
        latents=np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for row in noise]),
        **options,
    )
    request = {"prompts": list(texts), "sizes": [list(size) for size in sizes], "dtype": "float32", **options}
    theirs, their_latents = _generate_with_diffusers(exported, request, noise, images)
    flat = [image.reshape(len(row), -1) for image, row in zip(latents, noise, strict=True)]
    return Comparison(
        [pipeline.decode(image) for image in latents],
        theirs,
        max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(flat, their_latents, strict=True)),
        max(float(np.abs(a - b).max()) for a, b in zip(flat, noise, strict=True)),
    )


def _noise(pipeline: Pipeline, sizes: Sequence[tuple[int, int]], seed: int) -> list[Float[np.ndarray, "_ C"]]:
    rng, channels = np.random.default_rng(seed), pipeline.transformer.config.latent_channels
    tokens = [width * height // pipeline.vae.config.factor**2 for width, height in sizes]
    return [rng.normal(size=(count, channels)).astype(np.float32) for count in tokens]


def _generate_with_diffusers(
    exported: pathlib.Path,
    request: Mapping[str, Any],
    noise: Sequence[Float[np.ndarray, "_ C"]],
    images: Sequence[Image.Image],
) -> tuple[list[UInt8[np.ndarray, "_ _ c"]], list[Float[np.ndarray, "_ C"]]]:
    """The images and latents that another process generates, see `qi2_torch.generate`."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        np.savez(folder / "latents.npz", **{str(index): row for index, row in enumerate(noise)})  # type: ignore[arg-type]
        paths = [str(folder / f"{index}.png") for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        files = {"folder": str(exported.resolve()), "latents": str(folder / "latents.npz"), "images": paths}
        (folder / "request.json").write_text(json.dumps({**request, **files}))
        command = [sys.executable, "-m", "qi2_torch.generate", str(folder / "request.json"), str(folder / "out.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"diffusers could not run {exported}:\n{done.stderr[-MAX_ERROR_TEXT:]}")
        with np.load(folder / "out.npz", allow_pickle=False) as out:
            indices = range(len(noise))
            return [out[str(index)] for index in indices], [out[f"latents_{index}"] for index in indices]


def compare_export(
    model: pathlib.Path, exported: pathlib.Path, *, weights: str = "ema", dtype: str | None = None
) -> dict[str, Comparison]:
    """Compares a model with its export; our weights are rounded as the export rounded them.

    Args:
      model: run, checkpoint or model folder.
      exported: diffusers folder that was exported from it.
      weights: weights of a run, "ema" or "model".
      dtype: dtype of the export; None: the dtype of the stored weights.

    Returns:
      The comparison of generation from texts; with an autoencoder of four channels also that of an edit.
    """
    pipeline = Pipeline.load(model, dtype=jnp.float32, item=weights, code=CODES.get(dtype or ""))
    comparisons = {"texts": compare(pipeline, exported, TEXTS, SIZES, steps=4)}
    if pipeline.vae.config.in_channels == 4:  # diffusers cannot edit with another autoencoder
        gradient = np.linspace(0, 255, 96 * 64 * 4).reshape(64, 96, 4).astype(np.uint8)
        comparisons["an edit with guidance"] = compare(
            pipeline,
            exported,
            TEXTS[:1],
            images=[Image.fromarray(gradient)],
            resolution=256,
            negative="",
            guidance=4.0,
            steps=4,
        )
    return comparisons
