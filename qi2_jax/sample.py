"""`qi2 sample DIR --prompt TEXT`: images from texts."""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from qi2_jax import cli
from qi2_jax.pipeline import Pipeline

MAX_LATENT_BYTES = 1 << 30
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="what to generate; may be repeated")
    texts.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--size", type=_size, default=(1024, 1024), metavar="WxH", help="pixels (default 1024x1024)")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `sample` and `edit` share."""
    parser.add_argument("model", type=pathlib.Path, metavar="DIR", help="a run, a checkpoint, or an imported folder")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from (default: the empty prompt)")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="G", help="guidance scale; 1 (default) is none")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of the sampler (default 40)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the initial noise (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at once (default 4)")
    parser.add_argument(
        "--latents", type=pathlib.Path, metavar="FILE.npy", help="initial noise [batch, tokens, channels]"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="of a run: averaged or raw")
    parser.add_argument("--out", type=_png, required=True, metavar="FILE.png", help="several get a number")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} does not look like 1024x768") from None
    return width, height


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to {(1 << 32) - 1}")
    return int(text)


def _png(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, which keeps alpha and every value")
    return path


def generate(arguments: argparse.Namespace, texts: Sequence[str], **options: Any) -> list[pathlib.Path]:
    """Generates with the common arguments and writes the images; returns their paths."""
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of sampling
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out} cannot be written; choose another --out")
    if arguments.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # TPUs would multiply in bf16
    pipeline = Pipeline.load(arguments.model, dtype=DTYPES[arguments.dtype], item=arguments.weights)
    negative = arguments.negative
    if arguments.guidance > 1 and negative is None:
        negative = ""
    images = pipeline.in_batches(
        texts,
        batch_size=arguments.batch_size,
        negative=negative,
        guidance=arguments.guidance,
        steps=arguments.steps,
        seed=arguments.seed,
        latents=None if arguments.latents is None else read_latents(arguments.latents),
        progress=lambda steps: tqdm(steps, desc="sample", unit="step", dynamic_ncols=True),
        **options,
    )
    paths = [out] if len(texts) == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(len(texts))]
    for path, image in zip(paths, images, strict=True):  # written batch by batch
        Image.fromarray(image).save(path)
        print(path)
    return paths


def read_latents(path: pathlib.Path) -> np.ndarray:
    """Initial noise from an .npy file.

    Raises:
      ValueError: if it is none, too large, or not three-dimensional numbers.
    """
    if not path.is_file() or path.stat().st_size > MAX_LATENT_BYTES:
        raise ValueError(f"{path} is not a file of at most {MAX_LATENT_BYTES} bytes")
    try:
        latents = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may promise more than the file holds
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of numbers: {error}") from error
    if not isinstance(latents, np.ndarray) or latents.ndim != 3 or latents.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers of shape [batch, tokens, channels]")
    return latents.astype(np.float32)


def main(arguments: argparse.Namespace) -> None:
    texts = arguments.prompt
    if arguments.prompts is not None:
        if not arguments.prompts.is_file():
            raise ValueError(f"{arguments.prompts} does not exist; give a text file with one prompt per line")
        texts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"{arguments.prompts} holds no prompt")
    generate(arguments, texts, sizes=[arguments.size] * len(texts))


if __name__ == "__main__":
    cli.main(["sample", *sys.argv[1:]])
