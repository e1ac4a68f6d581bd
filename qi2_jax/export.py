"""`qi2 export DIR --out DIFFUSERS_DIR`: a run, a checkpoint or a model folder into a published pipeline folder.

A LoRA run becomes a whole pipeline with the adapter merged into it or, with `--lora`, a folder with the adapter alone.
"""

import argparse
import pathlib
import sys

from qi2_jax import cli, runs
from qi2_jax.interop import folder, lora
from qi2_jax.interop.weights import Weights
from qi2_jax.job.verify import check_installed, compare

CODES = {"bfloat16": "BF16", "float32": "F32"}
VERIFY_TEXTS, VERIFY_SIZES = ("A lighthouse above the sea at dawn.", "一只红色的狐狸"), ((256, 256), (320, 192))
MAX_PIXEL_DIFFERENCE, MAX_LATENT_ERROR = 1, 1e-4  # of 255; relative


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=pathlib.Path, metavar="DIR", help="a run or job, a checkpoint, or an imported folder"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIFFUSERS_DIR", help="folder to make")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="of a run: averaged or raw")
    parser.add_argument("--dtype", choices=CODES, help="convert all weights (default: as they are stored)")
    parser.add_argument("--lora", action="store_true", help="of a LoRA run: the adapter alone, for load_lora_weights")
    parser.add_argument(
        "--verify", action="store_true", help="generate with both sides from the same noise in fp32 and compare"
    )


def main(arguments: argparse.Namespace) -> None:
    if arguments.verify and arguments.lora:
        raise ValueError("--verify compares whole pipelines, and --lora exports none: leave one of them out")
    if arguments.verify:
        check_installed()  # now, not after minutes of copying
    located = runs.locate(arguments.model, arguments.weights)
    located.check()
    code = CODES.get(arguments.dtype)
    if arguments.lora:
        config, leaves = located.adapter(arguments.weights)
        print(lora.export_lora(leaves, config, arguments.out, code))
        return
    replace: dict[str, Weights] = {}
    if located.checkpoint is not None:
        replace["transformer"] = located.weights("transformer", arguments.weights)
    print(folder.describe(folder.export_folder(located.model, arguments.out, replace=replace, code=code)))
    if arguments.verify:
        verify(arguments)


def verify(arguments: argparse.Namespace) -> None:
    """Prints the largest difference between both sides, ours with weights rounded as the export rounded them.

    Raises:
      ValueError: if it is more than rounding.
    """
    import jax.numpy as jnp
    import numpy as np
    from PIL import Image

    from qi2_jax.pipeline import Pipeline

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


if __name__ == "__main__":
    cli.main(["export", *sys.argv[1:]])
