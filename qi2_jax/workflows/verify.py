"""Compares generation here with generation by diffusers and PyTorch on the exported folder, from the same noise."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.text import prompts


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What both sides generated.

    Attributes:
      ours, theirs: images 0..255.
      latent_error: largest difference of the latents before decoding, relative to their largest value.
      moved: largest difference of the latents to the noise they began as: 0 for a transformer that predicts nothing,
        which leaves nothing to compare.
    """

    ours: list[UInt8[np.ndarray, "H W c"]]
    theirs: list[UInt8[np.ndarray, "H W c"]]
    latent_error: float
    moved: float

    @property
    def largest_difference(self) -> int:
        pairs = zip(self.ours, self.theirs, strict=True)
        return max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)


def check_installed() -> None:
    """Raises a ValueError that says what to install if PyTorch or diffusers are missing."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"a comparison with diffusers needs {missing}; pip install -r requirements-dev.txt")


def compare(
    pipeline: Pipeline,
    exported: pathlib.Path,
    texts: Sequence[str],
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    images: Sequence[Image.Image] = (),
    resolution: int = 1024,
    negative: str | None = None,
    guidance: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> Comparison:
    """Generates every text on both sides, in fp32 and one by one there, from the same noise.

    Args:
      pipeline: loaded in float32.
      exported: the published folder, which a Python process with torch and diffusers reads.
      texts, sizes, images, resolution, negative, guidance, steps: as in `Pipeline.denoise`.
      seed: of the noise.

    Raises:
      ValueError: if torch or diffusers are not installed, or their process fails (with the end of what it printed).
    """
    check_installed()
    if sizes is None:
        size = prompts.resize_condition(images[-1], resolution).size if images else (resolution, resolution)
        sizes = [size] * len(texts)
    rng, channels = np.random.default_rng(seed), pipeline.transformer.config.latent_channels
    tokens = [width * height // pipeline.vae.config.factor**2 for width, height in sizes]
    noise = [rng.normal(size=(count, channels)).astype(np.float32) for count in tokens]
    padded = np.stack([np.pad(row, ((0, max(tokens) - len(row)), (0, 0))) for row in noise])
    latents = pipeline.denoise(
        texts,
        sizes=sizes,
        images=images,
        resolution=resolution,
        latents=padded,
        steps=steps,
        guidance=guidance,
        negative=negative,
    )
    ours = [pipeline.decode(own) for own in latents]
    flat = [own.reshape(-1, channels) for own in latents]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        np.savez(folder / "latents.npz", **{str(index): row for index, row in enumerate(noise)})  # type: ignore[arg-type]
        paths = [str(folder / f"{index}.png") for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        request = {
            "folder": str(exported.resolve()),
            "prompts": list(texts),
            "sizes": [list(size) for size in sizes],
            "negative": negative,
            "guidance": guidance,
            "steps": steps,
            "latents": str(folder / "latents.npz"),
            "images": paths,
            "resolution": resolution,
            "dtype": "float32",
        }
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "qi2_torch.generate", str(folder / "request.json"), str(folder / "out.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"diffusers could not run {exported}:\n{done.stderr[-3000:]}")
        with np.load(folder / "out.npz", allow_pickle=False) as out:
            theirs = [out[str(index)] for index in range(len(texts))]
            other = [out[f"latents_{index}"] for index in range(len(texts))]
    return Comparison(
        ours,
        theirs,
        max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(flat, other, strict=True)),
        max(float(np.abs(a - b).max()) for a, b in zip(flat, noise, strict=True)),
    )


CODES = {"bfloat16": "BF16", "float32": "F32"}

VERIFY_TEXTS, VERIFY_SIZES = ("A lighthouse above the sea at dawn.", "一只红色的狐狸"), ((256, 256), (320, 192))

MAX_PIXEL_DIFFERENCE, MAX_LATENT_ERROR = 1, 1e-4  # of 255; relative


def verify(arguments: argparse.Namespace) -> None:
    """Prints the largest difference between both sides, ours with weights rounded as the export rounded them.

    Raises:
      ValueError: if it is more than rounding.
    """
    import jax.numpy as jnp
    import numpy as np
    from PIL import Image

    from qi2_jax.inference.pipeline import Pipeline

    code = CODES.get(arguments.dtype)
    pipeline = Pipeline.load(arguments.model, dtype=jnp.float32, item=arguments.weights, code=code)
    comparisons = {"texts": compare(pipeline, arguments.out, VERIFY_TEXTS, VERIFY_SIZES, steps=4)}
    if pipeline.vae.config.in_channels == 4:  # diffusers edits with no other
        gradient = np.linspace(0, 255, 96 * 64 * 4).reshape(64, 96, 4).astype(np.uint8)
        comparisons["an edit with guidance"] = compare(
            pipeline,
            arguments.out,
            VERIFY_TEXTS[:1],
            images=[Image.fromarray(gradient)],
            resolution=256,
            negative="",
            guidance=4.0,
            steps=4,
        )
    for name, both in comparisons.items():
        print(
            f"{name}: largest difference to diffusers over {len(both.ours)} images: {both.largest_difference} of 255; "
            f"of the latents, relative: {both.latent_error:.1e}"
        )
        if both.moved == 0:
            print("the transformer predicts nothing yet (an untrained one ends in zeros): only the rest was compared")
    if not all(
        both.largest_difference <= MAX_PIXEL_DIFFERENCE and both.latent_error <= MAX_LATENT_ERROR
        for both in comparisons.values()
    ):
        raise ValueError(f"{arguments.out} does not generate the same images as {arguments.model}")
