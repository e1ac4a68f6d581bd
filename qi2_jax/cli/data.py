"""`qi2 data ingest|synth|score|select|cache|report ..`: raw pairs and edits become records, scores, the index of a
stage, and the encoded samples that training reads."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

from rich.console import Console

from data_pipeline import filters
from data_pipeline.config import DataConfig
from data_pipeline.filters.cluster import fit_centroids
from data_pipeline.filters.label_alignment import CAVEAT
from data_pipeline.records.schema import MAX_IMAGE_BYTES
from data_pipeline.scoring import cascade
from data_pipeline.selection.index import INDEX, write_selection
from data_pipeline.selection.report import write_report
from data_pipeline.selection.select import select
from data_pipeline.sources import LOOKED_FOR, Options
from data_pipeline.sources.ingest import ingest
from qi2_jax.cli import synth
from qi2_jax.config import loading
from qi2_jax.config.parsing import parse
from qi2_jax.runtime import devices
from qi2_jax.runtime.atomic import write_json_atomic

# Kinds of synthetic data: purpose, arguments, and the command, which returns its figures.
Synthesis = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace, Console], dict[str, Any]]
]
SYNTHESES: dict[str, Synthesis] = {
    "text": (
        "make text-rich pictures in many scripts, with captions that quote them",
        synth.add_text_arguments,
        synth.run_text,
    ),
    "edits": (
        "make exact edit pairs from the real pictures of a records folder",
        synth.add_edits_arguments,
        synth.run_edits,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name, run, purpose, steps=steps):
        sub = steps.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to this file")
        return sub

    def add_selection(sub, counts="data.* counts"):
        sub.add_argument("folder", type=pathlib.Path, metavar="DIR", help="folder of scored records")
        sub.add_argument("--config", dest="experiment", required=True, metavar="EXPERIMENT", help=f"whose {counts}")
        sub.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as data.thresholds.min_side=512"
        )

    sub = step("ingest", _ingest, "turn sources of image-text pairs and edits into one folder of records")
    sub.add_argument("sources", nargs="+", metavar="SRC", help=f"a file or folder: {LOOKED_FOR}")
    sub.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of records to make")
    sub.add_argument("--name", help="of the data set in every record (default: that of the file or folder)")
    sub.add_argument("--licence", help="of the samples that name none")
    sub.add_argument("--column", action="append", default=[], metavar="FIELD=NAME", help="which column holds a field")
    sub.add_argument("--split", default="train", help="of a tfds: data set, such as train[:10%%] (default: train)")
    sub.add_argument("--data-dir", type=pathlib.Path, metavar="DIR", help="where tfds: data sets are prepared")
    sub.add_argument("--max-image-bytes", type=int, default=MAX_IMAGE_BYTES, metavar="N", help="refuse larger files")
    sub.add_argument("--records-per-shard", type=int, default=256, metavar="N", help="default 256")

    syntheses = steps.add_parser("synth", help="make records with exact captions")
    kinds = syntheses.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (purpose, add, run) in SYNTHESES.items():
        sub = step(kind, run, purpose, kinds)
        sub.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of records to make")
        add(sub)

    sub = step("score", _score, "ask every filter about every record; what is scored already is not done again")
    sub.add_argument("folder", metavar="DIR", help="folder of records; with --runner also gs://BUCKET/DIR")
    sub.add_argument(
        "--clip", type=pathlib.Path, metavar="DIR", help="CLIP or SigLIP as transformers saves it, for alignment"
    )
    sub.add_argument(
        "--aesthetic", type=pathlib.Path, metavar="FILE.safetensors", help="linear head on the embeddings of --clip"
    )
    sub.add_argument(
        "--labels",
        type=pathlib.Path,
        metavar="DIR",
        help="for trials without a CLIP: label_alignment by the folder that qi2_torch.efficientnet_lite wrote",
    )
    sub.add_argument("--clusters", type=int, metavar="K", help="also find K groups of pictures by the same embeddings")
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    sub.add_argument("--runner", metavar="RUNNER", help="of Apache Beam: DirectRunner or DataflowRunner")
    sub.add_argument(
        "--beam-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="of the runner, as --beam-option=--region=R",
    )

    sub = step("select", _select, "apply the thresholds of a config to the scores; no image is read")
    add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help=f"index to write (default: DIR/{INDEX})")

    sub = step("cache", _cache, "encode the selected records once: latents and text features, what training reads")
    add_selection(sub, "data.* and encode.* count")
    sub.add_argument("--model", type=pathlib.Path, required=True, help="whose encoders: an imported folder, or a run")
    sub.add_argument("--index", type=pathlib.Path, metavar="FILE", help=f"selection (default: DIR/{INDEX})")
    sub.add_argument("--out", type=pathlib.Path, metavar="DIR", help="cache to make (default: DIR/samples)")

    sub = step("report", _report, "draw one HTML page of what a selection does and why, with pictures")
    add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help="page to write (default: DIR/report.html)")


def _ingest(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    columns: dict[str, str] = {}
    for item in arguments.column:
        field, _, name = item.partition("=")
        if not field or not name:
            raise ValueError(f"--column {item} is not FIELD=NAME; write it as --column image=NAME")
        columns[field] = name
    options = Options(
        arguments.name, arguments.licence, arguments.max_image_bytes, columns, arguments.split, arguments.data_dir
    )
    report = ingest(arguments.sources, arguments.out, options, records_per_shard=arguments.records_per_shard)
    console.print(report.table())
    return report.to_dict()


def _score(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.clusters is not None and arguments.clip is None:
        raise ValueError("--clusters groups the embeddings of a CLIP: name its folder with --clip")
    fitted = None if arguments.clusters is None else fit_centroids(arguments.folder, arguments.clip, arguments.clusters)
    chosen = filters.cascade(arguments.clip, arguments.aesthetic, fitted, arguments.labels)
    if arguments.runner is None:
        if arguments.beam_option:
            raise ValueError(f"--beam-option is {arguments.beam_option}, but no --runner is named")
        report = cascade.score(arguments.folder, filters=chosen, workers=arguments.workers)
    else:
        from data_pipeline.scoring.beam import score_with_beam

        report = score_with_beam(arguments.folder, arguments.runner, arguments.beam_option, filters=chosen)
    console.print(report.table())
    if arguments.labels is not None:
        console.print(f"LABEL_ALIGNMENT: {CAVEAT}", style="bold red")
    return report.to_dict()


def _data_config(arguments: argparse.Namespace) -> DataConfig:
    """The group `data` of the experiment that the arguments name."""
    config = loading.to_dict(loading.load(arguments.experiment, arguments.overrides))
    if "data" not in config:
        raise ValueError(f"{arguments.experiment} has no group 'data'; name the config of a stage")
    return parse(DataConfig, config["data"], "data")


def _select(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    selection = select(arguments.folder, _data_config(arguments).thresholds)
    console.print(selection.table())
    out = arguments.out or arguments.folder / INDEX
    write_selection(out, selection)
    console.print(f"{len(selection.kept):,} records in {out}")
    return selection.to_dict()


def _cache(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from qi2_jax.workflows import config as configs
    from qi2_jax.workflows import encode

    config = configs.load(arguments.experiment, arguments.overrides)
    if not isinstance(config, configs.StageExperiment):
        raise ValueError(f"{arguments.experiment} is a curriculum; encode with the config of one of its stages")
    devices.set_platform(config, (config.encode.mesh,))

    report = encode.encode(
        config,
        arguments.folder,
        arguments.index or arguments.folder / INDEX,
        arguments.model,
        arguments.out or arguments.folder / "samples",
    )
    if report is None:
        console.print("this process has written its units; the last of the others will complete the cache")
        return {}
    console.print(report.table())
    return report.to_dict()


def _report(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    data = _data_config(arguments)
    selection = select(arguments.folder, data.thresholds)
    out = arguments.out or arguments.folder / "report.html"
    figures = write_report(out, arguments.folder, selection, data.resolutions)
    console.print(selection.table())
    console.print(f"page: {out}")
    return selection.to_dict() | figures


def main(arguments: argparse.Namespace) -> None:
    figures = arguments.run(arguments, Console())
    if arguments.json is not None:
        write_json_atomic(arguments.json, figures)
    if figures.get("shortfall"):
        raise ValueError(figures["shortfall"])
