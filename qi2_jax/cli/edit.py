"""`qi2 edit DIR --prompt TEXT --image FILE`: an image from an instruction and condition images."""

import argparse
import pathlib

from qi2_jax.cli.sample import add_common_arguments, generate, resolution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "that of the last condition image")
    parser.add_argument(
        "--image",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="FILE",
        help="condition image; may be repeated, and the order counts",
    )
    parser.add_argument(
        "--resolution",
        type=resolution,
        default=1024,
        metavar="R",
        help="condition images are resized to an area of R x R pixels (default 1024)",
    )


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.decoding.images import read_image

    images = [read_image(path) for path in arguments.image]
    generate(arguments, images=images, resolution=arguments.resolution)
