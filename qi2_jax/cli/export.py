"""`qi2 export DIR --out DIFFUSERS_DIR`: a run, a checkpoint or a model folder into a published pipeline folder.

A LoRA run becomes a whole pipeline with the adapter merged into it or, with `--lora`, a folder with the adapter alone.
"""

import argparse
import pathlib

from qi2_jax.interop import files, folder, lora
from qi2_jax.interop.weights import Weights
from qi2_jax.runs import locating
from qi2_jax.runtime import compilation_cache
from qi2_jax.workflows.verify import CODES, check_installed, verify


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
    located = locating.locate(arguments.model, arguments.weights)
    files.check_outside(arguments.out, located.model, located.checkpoint)
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
        compilation_cache.use()
        verify(arguments)
