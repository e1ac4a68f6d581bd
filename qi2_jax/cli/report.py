"""`qi2 report RUN`: one page about a run, or about all runs of a job or a curriculum: curves, events, samples, config.

The page holds everything inside itself and loads nothing. Names and messages are data from outside: they are escaped.
Nothing here touches a device, so that a page can be drawn beside a training.
"""

import argparse
import pathlib

from qi2_jax.reporting.run_report import write_report
from qi2_jax.runtime.atomic import write_json_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="a run, or a folder with runs below it")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures as JSON, too")


def main(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.run / "report.html"
    figures = write_report(out, arguments.run)
    if arguments.json:
        write_json_atomic(arguments.json, {"runs": figures})
    for one in figures:
        print(f"{one['run']}: step {one['step']} of {one['steps']}, {one['state']}")
    print(out)
