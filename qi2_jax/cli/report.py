"""`qi2 report RUN`: one page about a run, or about all runs of a job or a curriculum.

The page contains curves, events, samples and configs, and loads nothing from outside. The command uses no device, so a
page can be drawn while the run trains.
"""

import argparse
import pathlib

from qi2_jax.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=pathlib.Path, metavar="RUN", help="a run, or a folder with runs below it")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the page (default: RUN/report.html)")
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="also write the figures as JSON")


def main(arguments: argparse.Namespace) -> None:
    from qi2_jax.reporting.run_report import write_report
    from qi2_jax.runtime import outputs
    from qi2_jax.runtime.atomic import write_json_atomic

    out = arguments.out or arguments.run / "report.html"
    outputs.check_outside(out, arguments.run, allowed_suffix=".html")
    outputs.check_json(arguments.json)
    figures = write_report(out, arguments.run)
    if arguments.json:
        write_json_atomic(arguments.json, {"runs": figures})
    for run in figures:
        print(f"{run['run']}: step {run['step']} of {run['steps']}, {run['state']}")
    print(out)
