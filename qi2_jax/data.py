"""`qi2 data ingest|score|select|report ..`: raw pairs and edits become records, scores, and the index of a stage."""

import argparse
import pathlib
import sys
from typing import Any

from rich.console import Console

from data_pipeline import cascade, filters
from data_pipeline.atomic import write_json_atomic
from data_pipeline.buckets import Resolutions
from data_pipeline.ingest import ingest
from data_pipeline.records import MAX_IMAGE_BYTES
from data_pipeline.report import write_report
from data_pipeline.selection import Thresholds, select, write_selection
from data_pipeline.sources import LOOKED_FOR, Options
from qi2_jax import cli
from qi2_jax import config as configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name, run, purpose):
        sub = steps.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to this file")
        return sub

    def add_selection(sub):
        sub.add_argument("folder", type=pathlib.Path, metavar="DIR", help="folder of scored records")
        sub.add_argument("--config", dest="experiment", required=True, metavar="EXPERIMENT", help="whose data.* counts")
        sub.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as data.thresholds.min_side=512"
        )

    sub = step("ingest", _ingest, "turn a source of image-text pairs and edits into a folder of records")
    sub.add_argument("source", type=pathlib.Path, metavar="SRC", help=f"a file or folder: {LOOKED_FOR}")
    sub.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of records to make")
    sub.add_argument("--name", help="of the data set in every record (default: that of the file or folder)")
    sub.add_argument("--licence", help="of the samples that name none")
    sub.add_argument("--column", action="append", default=[], metavar="FIELD=NAME", help="which column holds a field")
    sub.add_argument("--max-image-bytes", type=int, default=MAX_IMAGE_BYTES, metavar="N", help="refuse larger files")
    sub.add_argument("--records-per-shard", type=int, default=256, metavar="N", help="default 256")

    sub = step("score", _score, "ask every filter about every record; what is scored already is not done again")
    sub.add_argument("folder", type=pathlib.Path, metavar="DIR", help="folder of records")
    sub.add_argument(
        "--clip", type=pathlib.Path, metavar="DIR", help="CLIP or SigLIP as transformers saves it, for alignment"
    )
    sub.add_argument(
        "--aesthetic", type=pathlib.Path, metavar="FILE.safetensors", help="linear head on the embeddings of --clip"
    )
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    sub = step("select", _select, "apply the thresholds of a config to the scores; no image is read")
    add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help="index to write (default: DIR/selection.parquet)")

    sub = step("report", _report, "draw one HTML page of what a selection does and why, with pictures")
    add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help="page to write (default: DIR/report.html)")


def _ingest(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    columns = dict(item.split("=", 1) if "=" in item else (item, "") for item in arguments.column)
    options = Options(arguments.name, arguments.licence, arguments.max_image_bytes, columns)
    report = ingest(arguments.source, arguments.out, options, records_per_shard=arguments.records_per_shard)
    console.print(report.table())
    return report.to_dict()


def _score(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    chosen = filters.cascade(arguments.clip, arguments.aesthetic)
    report = cascade.score(arguments.folder, filters=chosen, workers=arguments.workers)
    console.print(report.table())
    return report.to_dict()


def _select(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = configs.load(arguments.experiment, arguments.overrides)
    selection = select(arguments.folder, Thresholds(**config.data.thresholds))
    console.print(selection.table())
    out = arguments.out or arguments.folder / "selection.parquet"
    write_selection(out, selection)
    console.print(f"{len(selection.kept):,} records in {out}")
    return selection.to_dict()


def _report(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = configs.load(arguments.experiment, arguments.overrides).data
    selection = select(arguments.folder, Thresholds(**data.thresholds))
    out = arguments.out or arguments.folder / "report.html"
    write_report(out, arguments.folder, selection, Resolutions.of_config(data))
    console.print(selection.table())
    console.print(f"page: {out}")
    return selection.to_dict()


def main(arguments: argparse.Namespace) -> None:
    figures = arguments.run(arguments, Console())
    if arguments.json is not None:
        write_json_atomic(arguments.json, figures)


if __name__ == "__main__":
    cli.main(["data", *sys.argv[1:]])
