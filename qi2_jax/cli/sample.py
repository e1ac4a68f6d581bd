"""`qi2 sample DIR --prompt TEXT`: images from prompts."""

import argparse
import io
import logging
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

from qi2_jax.inference.sizes import MAX_SIDE, SIDE_MULTIPLE, check_size

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)
MAX_LATENT_BYTES = 1 << 30
MAX_COUNT = 1 << 16  # steps, or images in a batch
DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "1024x1024")
    parser.set_defaults(size=(1024, 1024))


def add_common_arguments(parser: argparse.ArgumentParser, size: str) -> None:
    """Adds the arguments that `sample` and `edit` share.

    Args:
      parser: parser that receives the arguments.
      size: default size, for the help.
    """
    parser.add_argument(
        "model", type=pathlib.Path, metavar="DIR", help="a run or job, a checkpoint, or an imported folder"
    )
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="what to generate; may be repeated")
    texts.add_argument(
        "--prompts",
        type=pathlib.Path,
        metavar="FILE",
        help="a text file with one prompt per line (UTF-8, or UTF-16 or UTF-32 with a byte-order mark)",
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help=f"pixels (default: {size})")
    parser.add_argument(
        "--negative", metavar="TEXT", help="prompt that guidance leads away from (default: the empty prompt)"
    )
    parser.add_argument(
        "--guidance", type=_guidance, default=1.0, metavar="G", help="guidance scale; 1 (default) turns guidance off"
    )
    parser.add_argument("--steps", type=_positive, default=40, metavar="N", help="number of sampler steps (default 40)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of the initial noise (default 0)")
    parser.add_argument("--batch-size", type=_positive, default=4, metavar="N", help="images per batch (default 4)")
    parser.add_argument(
        "--latents", type=pathlib.Path, metavar="FILE.npy", help="initial noise [batch, tokens, channels]"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights and activations (default bfloat16)"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="for a run: EMA or raw weights (default ema)"
    )
    parser.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="adapter to merge into the transformer (diffusers, peft, ComfyUI or kohya format); may be repeated",
    )
    parser.add_argument(
        "--out",
        type=_png,
        required=True,
        metavar="FILE.png",
        help="output file; with several prompts, _0, _1, ... is appended",
    )


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
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {MAX_COUNT}")
    return int(text)


def _guidance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1; 1 turns guidance off")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {(1 << 32) - 1}")
    return int(text)


def _lora(text: str) -> tuple[pathlib.Path, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or pathlib.Path(text).exists():
        return pathlib.Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a file nor FILE:SCALE with a finite number such as 0.8")
    return pathlib.Path(path), value


def _png(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, the format that preserves alpha and every value")
    return path


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Returns the prompts of `--prompt` or `--prompts`.

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
    from qi2_jax.runtime.text_files import read_text, split_lines

    prompts = split_lines(read_text(arguments.prompts))
    if not prompts:
        raise ValueError(f"{arguments.prompts} contains no prompt; give one per line")
    return prompts


def generate(arguments: argparse.Namespace, **options: Any) -> list[pathlib.Path]:
    """Generates images with the common arguments and writes them.

    Args:
      arguments: parsed arguments of `add_common_arguments`.
      options: further arguments of `Pipeline.in_batches`.

    Returns:
      Paths of the images.
    """
    import jax.numpy as jnp
    from PIL import Image
    from tqdm import tqdm

    from qi2_jax.inference.pipeline import Pipeline
    from qi2_jax.runtime import compilation_cache, outputs
    from qi2_jax.runtime.atomic import write_atomic

    texts, negative = read_prompts(arguments), arguments.negative
    if negative is not None and arguments.guidance == 1:
        raise ValueError("--negative has no effect without guidance; give a --guidance above 1")
    latents = None if arguments.latents is None else read_latents(arguments.latents)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)  # before minutes of sampling
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out} cannot be written; choose another --out")
    paths = [out] if len(texts) == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(len(texts))]
    for path in paths:
        outputs.check_outside(path, *getattr(arguments, "image", ()))
    compilation_cache.use()
    dtype = getattr(jnp, arguments.dtype)
    pipeline = Pipeline.load(arguments.model, dtype=dtype, item=arguments.weights, loras=arguments.lora)
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
    _log.info("encoding the prompts; programs for a new size are compiled first, which can take minutes")
    for path, image in zip(paths, images, strict=True):  # written batch by batch
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        write_atomic(path, png.getvalue())
        print(path)
    return paths


def resolution(text: str) -> int:
    """Parses the side of a square whose area condition images get."""
    if not text.isdecimal() or not SIDE_MULTIPLE <= int(text) <= MAX_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {SIDE_MULTIPLE} to {MAX_SIDE}")
    return int(text)


def read_latents(path: pathlib.Path) -> "np.ndarray":
    """Reads initial noise from an .npy file.

    Raises:
      ValueError: if the file is missing or too large, or does not contain finite numbers in three dimensions.
    """
    import numpy as np

    if not path.is_file() or path.stat().st_size > MAX_LATENT_BYTES:
        raise ValueError(f"{path} is not a file of at most {MAX_LATENT_BYTES} bytes")
    try:
        latents = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may claim more than the file contains
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of numbers: {error}") from error
    if not isinstance(latents, np.ndarray) or latents.ndim != 3 or latents.dtype.kind not in "fiu":
        raise ValueError(f"{path} must contain numbers of shape [batch, tokens, channels]")
    latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise ValueError(f"{path} contains numbers that are not finite in float32")
    return latents


def main(arguments: argparse.Namespace) -> None:
    generate(arguments)
