"""`qi2 data ingest|synth|score|select|cache|report`: from raw pairs and edits to the samples that training reads."""

import argparse
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qi2_jax.cli import options, synth
from qi2_jax.runtime import outputs

if TYPE_CHECKING:
    from data_pipeline.config import DataConfig

Command = Callable[[argparse.Namespace], dict[str, Any]]  # runs a step, prints its tables and returns its figures
INDEX, SCORES = "selection.parquet", "scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    _add_ingest(_step(steps, "ingest", _ingest, "convert sources of image-text pairs and edits to a folder of records"))
    purpose = "make records with exact captions"
    kinds = steps.add_parser("synth", help=purpose).add_subparsers(dest="kind", required=True, metavar="KIND")
    synth.add_text_arguments(
        _step(kinds, "text", synth.run_text, "make text-rich images in many scripts, with captions that quote them")
    )
    synth.add_edits_arguments(
        _step(kinds, "edits", synth.run_edits, "make exact edit pairs from the real images of a records folder")
    )
    _add_score(_step(steps, "score", _score, "compute all missing scores of all records"))

    sub = _step(steps, "select", _select, "apply the thresholds of a config to the scores; reads no image")
    _add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help=f"index to write (default: DIR/{INDEX})")
    sub.add_argument(
        "--without-captions",
        action="store_true",
        help="also keep records without a usable caption, for the autoencoder; `cache` leaves them out and counts them",
    )

    sub = _step(steps, "cache", _cache, "encode the selected records once: latents and text features for training")
    _add_selection(sub, "data.* and encode.*")
    sub.add_argument(
        "--model", type=pathlib.Path, required=True, metavar="DIR", help="model folder or run whose encoders to use"
    )
    sub.add_argument("--index", type=pathlib.Path, metavar="FILE", help=f"selection (default: DIR/{INDEX})")
    sub.add_argument("--out", type=pathlib.Path, metavar="DIR", help="cache to create (default: DIR/samples)")

    sub = _step(steps, "report", _report, "draw an HTML page of a selection: what is dropped and why, with images")
    _add_selection(sub)
    sub.add_argument("--out", type=pathlib.Path, metavar="FILE", help="page to write (default: DIR/report.html)")


def _step(steps: Any, name: str, command: Command, purpose: str) -> argparse.ArgumentParser:
    parser = options.add_verb(steps, name, purpose)
    parser.set_defaults(command=command)
    parser.add_argument("--json", type=options.output_file, metavar="FILE", help="also write the figures to this file")
    return parser


def _add_ingest(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="a file or folder of images with captions, archives, tables, JSON lines or records, or a tfds: data set",
    )
    sub.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of records to create")
    sub.add_argument("--name", help="name of the data set in every record (default: name of the file or folder)")
    sub.add_argument("--licence", help="licence for samples without one")
    sub.add_argument(
        "--without-captions",
        action="store_true",
        help="also accept images without a caption, which train the autoencoder; other training counts and skips them",
    )
    sub.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="column or key of a field (image, text, captions, instruction, conditions, ...); may be repeated",
    )
    sub.add_argument(
        "--split", default="train", help="split of a tfds: data set, such as train[:10%%] (default: train)"
    )
    sub.add_argument("--data-dir", type=pathlib.Path, metavar="DIR", help="folder of prepared tfds: data sets")
    sub.add_argument(
        "--max-image-bytes", type=int, metavar="N", help="refuse image files larger than N bytes (default: 64 MiB)"
    )
    sub.add_argument("--records-per-shard", type=int, default=256, metavar="N", help="records per shard (default 256)")


def _add_score(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", metavar="DIR", help="folder of records; with --runner also gs://BUCKET/DIR")
    sub.add_argument(
        "--clip", type=pathlib.Path, metavar="DIR", help="CLIP or SigLIP in transformers' format, for alignment"
    )
    sub.add_argument(
        "--aesthetic", type=pathlib.Path, metavar="FILE.safetensors", help="linear head on the embeddings of --clip"
    )
    sub.add_argument(
        "--labels",
        type=pathlib.Path,
        metavar="DIR",
        help="for trials without a CLIP: output folder of qi2_torch.efficientnet_lite, for label_alignment",
    )
    sub.add_argument("--clusters", type=int, metavar="K", help="also find K clusters of images by their embeddings")
    sub.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    sub.add_argument("--runner", metavar="RUNNER", help="Apache Beam runner: DirectRunner or DataflowRunner")
    sub.add_argument(
        "--beam-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="option of the runner, written as --beam-option=--region=R",
    )


def _add_selection(sub: argparse.ArgumentParser, groups: str = "data.*") -> None:
    sub.add_argument("folder", type=pathlib.Path, metavar="DIR", help="folder of scored records")
    sub.add_argument(
        "--config", dest="experiment", required=True, metavar="EXPERIMENT", help=f"experiment whose {groups} to use"
    )
    options.add_overrides(sub, "data.thresholds.min_side=512")


def _ingest(arguments: argparse.Namespace) -> dict[str, Any]:
    from data_pipeline.records.schema import MAX_IMAGE_BYTES
    from data_pipeline.sources import Options
    from data_pipeline.sources.ingest import ingest
    from qi2_jax.cli import tables

    columns: dict[str, str] = {}
    for item in arguments.column:
        field, _, name = item.partition("=")
        if not field or not name:
            raise ValueError(f"--column {item} is not FIELD=NAME; write it as --column image=NAME")
        columns[field] = name
    outputs.check_outside(arguments.out, *filter(pathlib.Path.exists, map(pathlib.Path, arguments.sources)))
    limit = MAX_IMAGE_BYTES if arguments.max_image_bytes is None else arguments.max_image_bytes
    source = Options(
        arguments.name,
        arguments.licence,
        limit,
        columns,
        arguments.split,
        arguments.data_dir,
        without_captions=arguments.without_captions,
    )
    report = ingest(arguments.sources, arguments.out, source, records_per_shard=arguments.records_per_shard)
    tables.show(report.table())
    return report.to_dict()


def _score(arguments: argparse.Namespace) -> dict[str, Any]:
    from data_pipeline import filters
    from data_pipeline.filters.cluster import fit_centroids
    from data_pipeline.filters.label_alignment import CAVEAT
    from data_pipeline.scoring import cascade
    from qi2_jax.cli import tables

    if arguments.clusters is not None and arguments.clip is None:
        raise ValueError("--clusters groups the embeddings of a CLIP: name its folder with --clip")
    fitted = None if arguments.clusters is None else fit_centroids(arguments.folder, arguments.clip, arguments.clusters)
    chosen = filters.cascade(arguments.clip, arguments.aesthetic, fitted, arguments.labels)
    if arguments.runner is None:
        if arguments.beam_option:
            raise ValueError(f"--beam-option is {arguments.beam_option}, but --runner is missing")
        report = cascade.score(arguments.folder, filters=chosen, workers=arguments.workers)
    else:
        from data_pipeline.scoring.beam import score_with_beam

        report = score_with_beam(arguments.folder, arguments.runner, arguments.beam_option, filters=chosen)
    tables.show(report.table())
    if arguments.labels is not None:
        tables.warn(f"LABEL_ALIGNMENT: {CAVEAT}")
    return report.to_dict()


def _data_config(arguments: argparse.Namespace) -> "DataConfig":
    """The group `data` of the experiment that the arguments name."""
    from data_pipeline.config import DataConfig
    from qi2_jax.config import loading
    from qi2_jax.config.parsing import parse

    config = loading.to_dict(loading.load(arguments.experiment, arguments.overrides))
    if "data" not in config:
        raise ValueError(f"{arguments.experiment} has no group 'data'; name the config of a stage")
    return parse(DataConfig, config["data"], "data")


def _select(arguments: argparse.Namespace) -> dict[str, Any]:
    from data_pipeline.selection.index import write_selection
    from data_pipeline.selection.select import select
    from qi2_jax.cli import tables

    out = arguments.out or arguments.folder / INDEX
    outputs.check_outside(out, arguments.folder / SCORES)
    outputs.check_outside(out, arguments.folder, allowed_suffix=".parquet")
    selection = select(
        arguments.folder, _data_config(arguments).thresholds, without_captions=arguments.without_captions
    )
    tables.show(selection.table())
    write_selection(out, selection)
    print(f"{len(selection.kept):,} records in {out}")
    return selection.to_dict()


def _cache(arguments: argparse.Namespace) -> dict[str, Any]:
    from qi2_jax.cli import tables
    from qi2_jax.runs import locating
    from qi2_jax.runtime import devices
    from qi2_jax.workflows import encode
    from qi2_jax.workflows.config import StageExperiment, load_experiment

    config = load_experiment(arguments.experiment, arguments.overrides)
    if not isinstance(config, StageExperiment):
        raise ValueError(f"{arguments.experiment} is not a stage; encode with the config of a stage of a curriculum")
    index, out = arguments.index or arguments.folder / INDEX, arguments.out or arguments.folder / "samples"
    outputs.check_outside(out, index, locating.model_of(arguments.model), arguments.folder / SCORES)
    outputs.check_outside(out, arguments.folder, allowed_suffix="")
    devices.set_platform(config, (config.encode.mesh,))

    report = encode.encode(config, arguments.folder, index, arguments.model, out)
    if report is None:
        print("this process has written its units; the last process completes the cache")
        return {}
    tables.show(report.table())
    return report.to_dict()


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from data_pipeline.selection.report import write_report
    from data_pipeline.selection.select import select
    from qi2_jax.cli import tables

    out = arguments.out or arguments.folder / "report.html"
    outputs.check_outside(out, arguments.folder, allowed_suffix=".html")
    data = _data_config(arguments)
    selection = select(arguments.folder, data.thresholds)
    figures = write_report(out, arguments.folder, selection, data.resolutions)
    tables.show(selection.table())
    print(f"page: {out}")
    return selection.to_dict() | figures


def main(arguments: argparse.Namespace) -> None:
    outputs.check_json(arguments.json)
    figures = arguments.command(arguments)
    if arguments.json is not None:
        from qi2_jax.runtime.atomic import write_json_atomic

        write_json_atomic(arguments.json, figures)
    if figures.get("shortfall"):
        raise ValueError(figures["shortfall"])
