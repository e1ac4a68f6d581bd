"""`qi2 export DIR --out DIFFUSERS_DIR`: a run, a checkpoint or a model folder to a published pipeline folder.

A LoRA run becomes a whole pipeline with the adapter merged into it or, with `--lora`, a folder with the adapter alone.
"""

import argparse
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qi2_jax.interop.stored_weights import Weights

DTYPES = ("bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=pathlib.Path, metavar="DIR", help="a run or job, a checkpoint, or an imported folder"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIFFUSERS_DIR", help="folder to create")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="for a run: EMA or raw weights (default ema)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to convert all weights to (default: as stored)")
    parser.add_argument("--lora", action="store_true", help="for a LoRA run: the adapter alone, for load_lora_weights")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="generate with qi2 and with diffusers from the same noise in fp32, and compare",
    )


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.interop import folder
    from qi2_jax.interop.lora import writing
    from qi2_jax.runs import locating
    from qi2_jax.runtime import outputs
    from qi2_jax.workflows.verify import CODES, check_installed

    if arguments.verify and arguments.lora:
        raise ValueError("--verify compares whole pipelines, and --lora exports only an adapter: leave one of them out")
    if arguments.verify:
        check_installed()  # before minutes of copying
    located = locating.locate(arguments.model, arguments.weights)
    read = (arguments.model, located.model, located.checkpoint)
    outputs.check_outside(arguments.out, *read, *outputs.owners(arguments.out))
    located.check()
    code = CODES.get(arguments.dtype)
    if arguments.lora:
        config, leaves = located.adapter(arguments.weights)
        if located.start_lora() is None:
            print(writing.export_lora(leaves, config, arguments.out, code))
        else:
            print(writing.export_changes(located.changes(arguments.weights), arguments.out, code))
        return
    replace: dict[str, Weights] = {}
    if located.checkpoint is not None:
        replace["transformer"] = located.weights("transformer", arguments.weights)
    print(folder.describe(folder.export_folder(located.model, arguments.out, replace=replace, code=code)))
    if arguments.verify:
        _verify(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    from qi2_jax.runtime import compilation_cache
    from qi2_jax.workflows.verify import compare_export

    compilation_cache.use()
    comparisons = compare_export(arguments.model, arguments.out, weights=arguments.weights, dtype=arguments.dtype)
    for name, comparison in comparisons.items():
        print(f"{name}: {comparison.describe()}")
    if not all(comparison.is_equal for comparison in comparisons.values()):
        raise ValueError(f"{arguments.out} does not generate the same images as {arguments.model}")
