"""`qi2 import DIFFUSERS_DIR --out DIR`: a published pipeline folder to a model folder."""

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=pathlib.Path, metavar="DIFFUSERS_DIR", help="a Qwen-Image-2.1 pipeline folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="model folder to create")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="weights to read, such as fp16 for *.fp16.safetensors (default: those without a variant in their names, "
        "or the only variant)",
    )


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.interop import components, folder
    from qi2_jax.runtime import outputs
    from qi2_jax.text.prompts import PromptProcessor

    source = arguments.source
    outputs.check_outside(arguments.out, source, *outputs.owners(arguments.out))
    # A folder or tokenizer that cannot be used is reported before minutes of copying.
    folder.check_published(source, arguments.variant)
    PromptProcessor.from_folder(source / "processor", components.read_config(source / "text_encoder", "text_encoder"))
    print(folder.describe(folder.import_folder(source, arguments.out, arguments.variant)))
