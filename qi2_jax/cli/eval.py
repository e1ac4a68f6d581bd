"""`qi2 eval vae --data DIR`: judges autoencoders by their reconstructions."""

import argparse
import math
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qi2_jax.cli import options

if TYPE_CHECKING:
    from qi2_jax.evaluation.ocr import PageReader
    from qi2_jax.evaluation.vae import Evaluation

MAX_WORST, MAX_SIDE = 100, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    sub = options.add_verb(kinds, "vae", "compare autoencoders by their reconstructions, beside a linear code")
    sub.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        metavar="DIR",
        help="folder of images (a subfolder is a category) or of records",
    )
    sub.add_argument(
        "--model",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a run, checkpoint or model folder, or a diffusers folder of an AutoencoderKL, AutoencoderKLQwenImage, "
        "AutoencoderKLQwenImage21 or AutoencoderDC; may be repeated",
    )
    sub.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="for a run: EMA or raw weights (default ema)"
    )
    sub.add_argument(
        "--fit", type=pathlib.Path, metavar="DIR", help="images to fit the linear code on (default: those of --data)"
    )
    sub.add_argument(
        "--lpips", type=pathlib.Path, metavar="DIR", help="weights of LPIPS that `qi2 import` wrote (default: no LPIPS)"
    )
    sub.add_argument(
        "--ocr",
        action="append",
        nargs="?",
        default=[],
        metavar="CATEGORY",
        help="read the text pages, the images of this category (default text), and compare the texts; may be repeated",
    )
    sub.add_argument(
        "--held-out",
        type=_fraction,
        default=0.0,
        metavar="FRACTION",
        help="of records: measure only the share that training with data.held_out=FRACTION holds out (default: all)",
    )
    sub.add_argument(
        "--side", type=_side, metavar="N", help="resize the shorter side to N and crop to a square (default: no resize)"
    )
    sub.add_argument(
        "--max-side", type=_side, default=1024, metavar="N", help="crop larger images to N pixels (default 1024)"
    )
    sub.add_argument("--json", type=options.output_file, metavar="FILE", help="also write all figures to this file")
    sub.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder for sheets of the worst cases")
    sub.add_argument("--worst", type=_worst, default=8, metavar="N", help="cases on each sheet (default 8)")


def _side(text: str) -> int:
    return _integer(text, 16, MAX_SIDE)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def _worst(text: str) -> int:
    return _integer(text, 1, MAX_WORST)


def _integer(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
    return int(text)


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.cli import tables
    from qi2_jax.evaluation import summary, vae
    from qi2_jax.evaluation.autoencoders import find
    from qi2_jax.evaluation.perceptual import Perceptual
    from qi2_jax.runtime import compilation_cache, outputs
    from qi2_jax.runtime.atomic import write_json_atomic

    read = (arguments.data, arguments.fit, arguments.lpips, *arguments.model)
    outputs.check_json(arguments.json)
    for flag in ("json", "out"):
        if (path := getattr(arguments, flag)) is not None:
            outputs.check_outside(path, *read, flag=f"--{flag}")
    compilation_cache.use()
    pages = _page_reader(arguments.ocr)
    models = [find(path, arguments.weights) for path in arguments.model]
    perceptual = None if arguments.lpips is None else Perceptual(arguments.lpips)
    names = ("data", "fit", "held_out", "side", "max_side", "worst")
    chosen = vae.Options(**{name: getattr(arguments, name) for name in names})

    def save(evaluation: "Evaluation") -> None:
        if arguments.json is not None:
            write_json_atomic(arguments.json, evaluation.to_dict())

    evaluation = vae.evaluate(models, chosen, perceptual, pages, save)
    rows = evaluation.rows()
    tables.show(summary.table(f"Reconstruction of {arguments.data}", rows, evaluation.notes))
    _show_definitions(evaluation, summary.DEFINITIONS)
    tables.show(summary.quoted_table())
    if arguments.json is not None:
        print(arguments.json)
    if arguments.out is not None:
        for path in _draw(evaluation, arguments.out):
            print(path)
    if failed := evaluation.failed:
        messages = "".join(f"\n{name}: {message}" for name, message in failed.items())
        raise ValueError(f"{len(failed)} of {len(models)} models could not be measured:{messages}")


def _page_reader(categories: Sequence[str | None]) -> "PageReader | None":
    """OCR of text pages; None without `--ocr`. A category that is None is the default one."""
    from qi2_jax.evaluation.images import TEXT
    from qi2_jax.evaluation.ocr import Engine, PageReader

    if not categories:
        return None
    engine = Engine()
    return PageReader(tuple(dict.fromkeys(TEXT if name is None else name for name in categories)), engine, engine.name)


def _show_definitions(evaluation: "Evaluation", definitions: dict[str, str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from qi2_jax.evaluation.perceptual import FRECHET_NAME

    console, chosen = Console(), evaluation.options
    resize = "" if chosen.side is None else f"resized to a shorter side of {chosen.side} (Lanczos), then "
    console.print(
        Text(f"images: {resize}cropped about the center to multiples of {evaluation.multiple} pixels, at most ", "dim")
        + Text(f"{chosen.side or chosen.max_side} on a side", "dim")
    )
    left_out = [] if evaluation.perceptual is not None else ["LPIPS", FRECHET_NAME]
    left_out += [] if evaluation.pages is not None else ["NED"]
    for name, text in definitions.items():
        if name not in left_out:
            console.print(Text(f"{name}: {text}", "dim"))
    for reason, count in evaluation.refused.counts.items():
        names = ", ".join(evaluation.refused.examples[reason])
        console.print(Text(f"not measured: {count:,} {reason} ({names})", "bold red"))


def _draw(evaluation: "Evaluation", out: pathlib.Path) -> Sequence[pathlib.Path]:
    """Writes a sheet of the worst cases of every model."""
    import io

    from qi2_jax.evaluation import sheets
    from qi2_jax.runtime.atomic import write_atomic

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, result in enumerate(evaluation.results):
        png = io.BytesIO()
        sheets.draw(result.worst).save(png, "PNG")
        stem = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{result.model} f{result.factor}c{result.channels}").strip("_.")
        path = out / f"worst_{number}_{stem[-80:]}.png"
        write_atomic(path, png.getvalue())
        written.append(path)
    return written
