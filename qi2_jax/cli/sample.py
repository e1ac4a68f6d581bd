"""`qi2 sample DIR --prompt TEXT`: images from texts."""

import argparse
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from qi2_jax.inference.pipeline import MAX_SIDE, SIDE_MULTIPLE, Pipeline, check_size
from qi2_jax.runtime import compilation_cache
from qi2_jax.runtime.text_files import read_text, split_lines

MAX_LATENT_BYTES = 1 << 30
MAX_COUNT = 1 << 16  # of steps, and of images at once
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "1024x1024")
    parser.set_defaults(size=(1024, 1024))


def add_common_arguments(parser: argparse.ArgumentParser, size: str) -> None:
    """Arguments that `sample` and `edit` share; `size` says what the default is."""
    parser.add_argument(
        "model", type=pathlib.Path, metavar="DIR", help="a run or job, a checkpoint, or an imported folder"
    )
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="what to generate; may be repeated")
    texts.add_argument(
        "--prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="a text file with one prompt per line (UTF-8, or UTF-16 with a byte-order mark)",
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help=f"pixels (default: {size})")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from (default: the empty prompt)")
    parser.add_argument(
        "--guidance", type=_guidance, default=1.0, metavar="G", help="guidance scale; 1 (default) is none"
    )
    parser.add_argument("--steps", type=_positive, default=40, metavar="N", help="steps of the sampler (default 40)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the initial noise (default 0)")
    parser.add_argument("--batch-size", type=_positive, default=4, metavar="N", help="images at once (default 4)")
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
    try:
        check_size(width, height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return width, height


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 1 to {MAX_COUNT}")
    return int(text)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on; 1 is no guidance")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to {(1 << 32) - 1}")
    return int(text)


def _png(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, which keeps alpha and every value")
    return path


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of `--prompt` or `--prompts`.

    Raises:
      ValueError: if the file does not exist, is not text or contains no prompt, or an argument is not UTF-8.
    """
    for text in (*(arguments.prompt or ()), arguments.negative or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{text!r} is not UTF-8 text")
    if arguments.prompts is None:
        return arguments.prompt
    if not arguments.prompts.exists() or arguments.prompts.is_dir():
        raise ValueError(f"{arguments.prompts} is not a file; give a text file with one prompt per line")
    prompts = split_lines(read_text(arguments.prompts))
    if not prompts:
        raise ValueError(f"{arguments.prompts} holds no prompt")
    return prompts


def generate(arguments: argparse.Namespace, **options: Any) -> list[pathlib.Path]:
    """Generates with the common arguments and writes the images; returns their paths."""
    texts, negative = read_prompts(arguments), arguments.negative
    if negative is not None and arguments.guidance == 1:
        raise ValueError("--negative has no effect without guidance; give a --guidance above 1")
    latents = None if arguments.latents is None else read_latents(arguments.latents)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of sampling
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out} cannot be written; choose another --out")
    compilation_cache.use()
    pipeline = Pipeline.load(arguments.model, dtype=DTYPES[arguments.dtype], item=arguments.weights)
    if arguments.guidance > 1 and negative is None:
        negative = ""
    images = pipeline.in_batches(
        texts,
        batch_size=arguments.batch_size,
        negative=negative,
        guidance=arguments.guidance,
        steps=arguments.steps,
        seed=arguments.seed,
        sizes=arguments.size and [arguments.size] * len(texts),
        latents=latents,
        progress=lambda steps: tqdm(steps, desc="sample", unit="step", dynamic_ncols=True),
        **options,
    )
    paths = [out] if len(texts) == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(len(texts))]
    for path, image in zip(paths, images, strict=True):  # written batch by batch
        Image.fromarray(image).save(path)
        print(path)
    return paths


def resolution(text: str) -> int:
    """The side of an area, from the command line."""
    if not text.isdecimal() or not SIDE_MULTIPLE <= int(text) <= MAX_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from {SIDE_MULTIPLE} to {MAX_SIDE}")
    return int(text)


def read_latents(path: pathlib.Path) -> np.ndarray:
    """Initial noise from an .npy file.

    Raises:
      ValueError: if it is none, too large, or not three-dimensional finite numbers.
    """
    if not path.is_file() or path.stat().st_size > MAX_LATENT_BYTES:
        raise ValueError(f"{path} is not a file of at most {MAX_LATENT_BYTES} bytes")
    try:
        latents = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may promise more than the file holds
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of numbers: {error}") from error
    if not isinstance(latents, np.ndarray) or latents.ndim != 3 or latents.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers of shape [batch, tokens, channels]")
    latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise ValueError(f"{path} holds numbers that are not finite in float32")
    return latents


def main(arguments: argparse.Namespace) -> None:
    generate(arguments)
