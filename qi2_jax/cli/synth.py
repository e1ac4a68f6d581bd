"""`qi2 data synth edits|text`."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.synthesis.edits import synthesis as edits
from data_pipeline.synthesis.lettering.fonts import FOLDERS
from data_pipeline.synthesis.lettering.scripts import SCRIPTS
from data_pipeline.synthesis.text import synthesis as text


def add_edits_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qi2 data synth edits` beside --out and --json."""
    parser.add_argument(
        "--from", dest="pictures", type=Path, required=True, metavar="DIR", help="records folder of real pictures"
    )
    parser.add_argument(
        "--cutouts",
        type=Path,
        metavar="DIR",
        help="objects with transparency beside texts with their names, such as /usr/share/tuxpaint/stamps (default: "
        "records that have transparency)",
    )
    parser.add_argument("--cutouts-licence", metavar="TEXT", help="of the files of --cutouts")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="edits to make (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help=f"{', '.join(edits.KINDS)} (default: all for which there are pictures)",
    )
    parser.add_argument(
        "--max-side", type=int, default=1024, metavar="N", help="of a picture, in pixels (default 1024)"
    )
    parser.add_argument("--fonts", nargs="+", type=Path, default=list(FOLDERS), metavar="DIR", help="of Noto fonts")
    parser.add_argument("--name", default=edits.SOURCE, help="of the data set in every record")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--records-per-shard", type=int, default=256, metavar="N", help="default 256")


def run_edits(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command and prints its table; returns its figures."""
    report = edits.synthesize_edits(
        arguments.pictures,
        arguments.out,
        count=arguments.count,
        seed=arguments.seed,
        kinds=None if arguments.kinds is None else tuple(arguments.kinds),
        cutouts=arguments.cutouts,
        cutouts_licence=arguments.cutouts_licence,
        fonts=tuple(arguments.fonts),
        max_side=arguments.max_side,
        source=arguments.name,
        workers=arguments.workers,
        records_per_shard=arguments.records_per_shard,
    )
    console.print(report.table())
    return report.to_dict()


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qi2 data synth text` beside --out and --json."""
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="pictures to make (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument(
        "--strategy", nargs="+", default=list(text.STRATEGIES), metavar="NAME", help=", ".join(text.STRATEGIES)
    )
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), metavar="CODE", help=", ".join(SCRIPTS))
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="paragraphs, one per line: TEXT, LANGUAGE<tab>TEXT, or JSON"
    )
    parser.add_argument("--licence", help="of the texts of the corpus")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="records whose pictures are written on")
    parser.add_argument("--fonts", nargs="+", type=Path, default=list(FOLDERS), metavar="DIR", help="of Noto fonts")
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="root of the area in pixels (default 1024)")
    parser.add_argument("--name", default=text.SOURCE, help="of the data set in every record")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--records-per-shard", type=int, default=256, metavar="N", help="default 256")


def run_text(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs the command and prints its tables; returns its figures."""
    report = text.synthesize_text(
        arguments.out,
        count=arguments.count,
        seed=arguments.seed,
        strategies=tuple(arguments.strategy),
        scripts=tuple(arguments.scripts),
        fonts=tuple(arguments.fonts),
        corpus=arguments.corpus,
        licence=arguments.licence,
        scenes=arguments.scenes,
        side=arguments.side,
        source=arguments.name,
        workers=arguments.workers,
        records_per_shard=arguments.records_per_shard,
    )
    for view in report.tables():
        console.print(view)
    return report.to_dict()
