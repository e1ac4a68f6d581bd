"""`qi2 data synth text|edits`: arguments and commands of synthetic data."""

import argparse
from pathlib import Path
from typing import Any

from qi2_jax.runtime import outputs

# Names for the help. The libraries check the arguments, and tests compare these lists with theirs.
EDITS = ("text", "restoration", "tone", "insertion", "removal", "hue", "background", "compose2", "compose3")
STRATEGIES = ("pure", "scene", "layout", "glyphs", "photo")
DEFAULT_STRATEGIES = STRATEGIES[:-1]


def add_edits_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `qi2 data synth edits` except --json."""
    parser.add_argument(
        "--from", dest="records", type=Path, required=True, metavar="DIR", help="records folder of real images"
    )
    parser.add_argument(
        "--cutouts",
        type=Path,
        metavar="DIR",
        help="objects with transparency beside text files with their names, such as /usr/share/tuxpaint/stamps "
        "(default: records that have transparency)",
    )
    parser.add_argument("--cutouts-licence", metavar="TEXT", help="licence of the files in --cutouts")
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help=f"kinds of edits: {', '.join(EDITS)} (default: all for which there are images)",
    )
    parser.add_argument("--max-side", type=int, metavar="N", help="longest side of an image in pixels (default 1024)")
    _add_common(parser, "edits")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `qi2 data synth text` except --json."""
    parser.add_argument(
        "--strategy",
        nargs="+",
        metavar="NAME",
        help=f"kinds of images: {', '.join(STRATEGIES)} (default: {', '.join(DEFAULT_STRATEGIES)})",
    )
    parser.add_argument(
        "--scripts", nargs="+", metavar="CODE", help="ISO 15924 codes such as Latn, Hans or Arab (default: all)"
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="paragraphs, one per line: TEXT, LANGUAGE<tab>TEXT, or JSON"
    )
    parser.add_argument("--licence", help="licence of the texts in the corpus")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="records folder with the images to write text on")
    parser.add_argument(
        "--side", type=int, metavar="N", help="side of a square with the area of an image, in pixels (default 1024)"
    )
    _add_common(parser, "images")


def _add_common(parser: argparse.ArgumentParser, items: str) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of records to create")
    parser.add_argument("--count", type=int, metavar="N", help=f"number of {items} to make (default 1000)")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of all random choices (default 0)")
    parser.add_argument(
        "--fonts", nargs="+", type=Path, metavar="DIR", help="folders of Noto fonts (default: the system's)"
    )
    parser.add_argument("--name", help="name of the data set in every record")
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    parser.add_argument("--records-per-shard", type=int, metavar="N", help="records per shard (default 256)")


def _library_arguments(arguments: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Keyword arguments under a library's names. Arguments that the user omits keep the library's defaults."""
    common = {"count": "count", "seed": "seed", "fonts": "fonts", "name": "source", "workers": "workers"}
    values = {
        there: getattr(arguments, here)
        for here, there in (common | {"records_per_shard": "records_per_shard"} | names).items()
    }
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None
    }


def run_edits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes edits and prints a table; returns the figures."""
    from data_pipeline.synthesis.edits.synthesis import synthesize_edits
    from qi2_jax.cli import tables

    outputs.check_outside(arguments.out, arguments.records, arguments.cutouts)
    more = _library_arguments(
        arguments, kinds="kinds", cutouts="cutouts", cutouts_licence="cutouts_licence", max_side="max_side"
    )
    report = synthesize_edits(arguments.records, arguments.out, **more)
    tables.show(report.table())
    return report.to_dict()


def run_text(arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes images of text and prints tables; returns the figures."""
    from data_pipeline.synthesis.text.synthesis import synthesize_text
    from qi2_jax.cli import tables

    outputs.check_outside(arguments.out, arguments.scenes, arguments.corpus)
    names = {name: name for name in ("scripts", "corpus", "licence", "scenes", "side")}
    report = synthesize_text(arguments.out, **_library_arguments(arguments, strategy="strategies", **names))
    for table in report.tables():
        tables.show(table)
    return report.to_dict()
