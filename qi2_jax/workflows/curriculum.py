"""Runs a curriculum: a corpus, the models around the transformer, then one stage after another.

Each stage starts from the weights of the stage before it. Work that an interrupted call finished is not repeated.

    OUT/curriculum.json                 the config
    OUT/corpus/                         records that are made here if none are given
    OUT/vae/  OUT/model/                the autoencoder's run, and the models around the transformer
    OUT/stages/NAME/selection.parquet   the records on which a stage trains
    OUT/stages/NAME/samples/            these records, encoded
    OUT/stages/NAME/transformer/        the run of the stage
    OUT/diffusers/  OUT/report.json     the model of the last stage, and the metrics of all stages
"""

import logging
import pathlib
import time
from typing import Any

import jax

from data_pipeline.funnel import Table
from data_pipeline.records.shards import MANIFEST
from data_pipeline.samples.cache import Cache
from data_pipeline.selection.index import INDEX, read_selection
from qi2_jax import sequence
from qi2_jax.config import recorded
from qi2_jax.interop import folder
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import lock, processes
from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.tasks.transformer import start
from qi2_jax.tasks.transformer.config import model_config_for
from qi2_jax.tasks.transformer.task import train_transformer
from qi2_jax.training import restarting
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import changes, data, encode, job_folder, reports
from qi2_jax.workflows.checks import check_curriculum
from qi2_jax.workflows.config import CurriculumExperiment, StageExperiment
from qi2_jax.workflows.corpus import check_fonts, make_corpus
from qi2_jax.workflows.export import NOT_EXPORTED, export
from qi2_jax.workflows.reports import Show
from qi2_jax.workflows.selection import select_stage

log = logging.getLogger(__name__)


def run(
    config: CurriculumExperiment,
    out: pathlib.Path,
    records: pathlib.Path | None = None,
    *,
    accept_changes: bool = False,
    restart: bool = False,
    show: Show = reports.ignore,
) -> dict[str, Any]:
    """Trains all stages of a curriculum and exports the model of the last one.

    Args:
      config: see `experiments/qwen_image_2/curriculum.py`.
      out: folder that receives everything, see above.
      records: folder of scored records; None: `config.corpus` describes the records to make.
      accept_changes: whether to continue even if the config changed; existing results stay as they are.
      restart: see `loop.train`.
      show: function that draws the reports of all steps, in process 0.

    Returns:
      The metrics of `report.json`.

    Raises:
      ValueError: if `out` was created with another config or other data, a stage has nothing to train on, or a value
        cannot work. If possible, the error precedes all work.
    """
    if not job_folder.is_usable(out, paths.CURRICULUM, config.compilation_cache):
        raise ValueError(f"{out} contains files that no curriculum made; choose an empty or new folder")
    if records is not None and not (records / MANIFEST).is_file():
        raise ValueError(
            f"{records} is not a folder of records: `qi2 data ingest` makes one, and `qi2 data score` scores it"
        )
    check_curriculum(config, out)
    with processes.raise_together():
        if jax.process_index() == 0 and records is None:
            check_fonts(config.corpus, out / paths.CORPUS)
    with lock.hold(out):
        show = show if jax.process_index() == 0 else reports.ignore
        return _run(config, out, records, accept_changes, restart, show)


def _run(
    config: CurriculumExperiment,
    out: pathlib.Path,
    records: pathlib.Path | None,
    accept_changes: bool,
    restart: bool,
    show: Show,
) -> dict[str, Any]:
    started = time.monotonic()
    for name in config.order:  # before another config is recorded
        restarting.check(out / paths.STAGES / name / paths.TRANSFORMER, restart=restart)
    _claim(config, out, records, accept_changes)
    log.info("data")
    with processes.raise_together():
        if jax.process_index() == 0:
            if records is None:
                make_corpus(config.corpus, out / paths.CORPUS, show)
            # Of all stages, so that missing data of a late stage are reported before any training.
            for name, stage in config.ordered.items():
                log.info("data of stage %s", name)
                select_stage(stage, records or out / paths.CORPUS / "records", out / paths.STAGES / name, show)
    records = records or out / paths.CORPUS / "records"
    log.info("models around the transformer")
    _make_models(config, out, records, accept_changes, restart)

    source = str(pathlib.Path(config.start.folder)) if config.start.folder else ""
    figures: dict[str, Any] = {}
    for number, (name, stage) in enumerate(config.ordered.items(), start=1):
        log.info("stage %d of %d: %s", number, len(config.order), name)
        place = out / paths.STAGES / name
        figures[name] = _run_stage(stage.with_start(source), records, out, place, show, accept_changes, restart)
        source = str(place / paths.TRANSFORMER)

    log.info("export")
    report = {"stages": figures, "minutes": (time.monotonic() - started) / 60}
    with processes.raise_together():
        if jax.process_index() == 0:
            write_json_atomic(out / "report.json", report)
            if config.stages[config.order[-1]].transformer.model.attention == sequence.BLOCK_CAUSAL:
                export(pathlib.Path(source), out / "diffusers")
            else:
                log.info("%s; `qi2 sample %s` generates images with it", NOT_EXPORTED, out)
    show(_table(report, out))
    return report


def _claim(config: CurriculumExperiment, out: pathlib.Path, records: pathlib.Path | None, accept_changes: bool) -> None:
    """Records the config, or compares it with the recorded one."""
    typed = {changes.RECORDS: str(records.absolute()) if records else "made here", **config.as_typed}
    with processes.raise_together():
        allowed = changes.may_change(config, out)
        if accept_changes:
            changes.check_accepted(config, out, typed, allowed)
        changed = recorded.claim(
            out / paths.CURRICULUM,
            typed,
            lambda key: accept_changes or allowed(key),
            cls=CurriculumExperiment,
            write=jax.process_index() == 0,
            hint="" if accept_changes else recorded.ACCEPT_HINT,
        )
    if changed:
        text = "\n  ".join(map(str, changed))
        log.info("this curriculum continues with another config; existing results stay as they are:\n  %s", text)


def _make_models(
    config: CurriculumExperiment, out: pathlib.Path, records: pathlib.Path, accept_changes: bool, restart: bool
) -> None:
    """Makes the condition encoder and trains the autoencoder, or takes both from `model.folder`."""
    model = out / paths.MODEL
    with processes.raise_together():
        if jax.process_index() == 0 and config.model.folder:
            model_folder.copy_encoders(locating.model_of(pathlib.Path(config.model.folder)), model)
        elif jax.process_index() == 0:
            model_folder.make_encoder(config.encoder, model)
    if not config.model.folder:
        name, first = next(iter(config.ordered.items()))
        index = out / paths.STAGES / name / INDEX
        kept = [row for row in read_selection(index) if not row.conditions]
        images = data.images_of(records, kept, first.data.resolutions, config.vae.channels)
        train_vae(
            config.vae,
            images,
            out / paths.VAE,
            model,
            held_out=first.data.held_out,
            accept_changes=accept_changes,
            restart=restart,
        )


def _run_stage(
    stage: StageExperiment,
    records: pathlib.Path,
    out: pathlib.Path,
    place: pathlib.Path,
    show: Show,
    accept_changes: bool,
    restart: bool,
) -> dict[str, Any]:
    """Encodes and trains a stage.

    Args:
      stage: config of the stage, whose `transformer.start` names the run of the stage before it.
      records: folder of scored records.
      out: folder of the curriculum.
      place: folder of the stage.
      show: function that draws the report of encoding.
      accept_changes: see `loop.train`.
      restart: see `loop.train`.

    Returns:
      The metrics of the stage.
    """
    started, run, model = time.monotonic(), place / paths.TRANSFORMER, out / paths.MODEL
    for _ in range(2):  # after the first pass all units are written, and the second completes the cache
        with processes.raise_together():
            others = sorted((out / paths.STAGES).glob(f"*/{paths.SAMPLES}"))
            encoded = encode.encode(stage, records, place / INDEX, model, place / paths.SAMPLES, others)
    assert encoded is not None
    show(encoded.table())
    samples = Cache(place / paths.SAMPLES)

    def prepare() -> None:
        if not (model / folder.MARK).is_file():
            shape = model_config_for(stage.transformer, samples)
            model_folder.finish(model, shape, stage.transformer.timesteps.shift)
        start.prepare_model_folder(stage.transformer, samples, model, run)

    # For a stage that is trained, this verifies that its last checkpoint is intact and not that of a failed run.
    train_transformer(stage, samples, run, accept_changes=accept_changes, restart=restart, prepare=prepare)
    losses = [line["validation_loss"] for line in metrics.lines(run / metrics.FILE) if "validation_loss" in line]
    return {
        "samples": len(samples),
        "steps": stage.transformer.train.steps,
        "validation_loss_before": losses[0] if losses else None,
        "validation_loss_after": losses[-1] if losses else None,
        "minutes": (time.monotonic() - started) / 60,
    }


def _table(report: dict[str, Any], out: pathlib.Path) -> Table:
    columns = ("stage", "samples", "steps", "validation loss, before -> after", "min")
    table = Table(f"curriculum in {out}, {report['minutes']:.1f} min for this call", columns, right=columns[1:])
    for name, figures in report["stages"].items():
        losses = figures["validation_loss_before"], figures["validation_loss_after"]
        loss = " -> ".join("unknown" if value is None else f"{value:.3f}" for value in losses)
        table.add_row(name, f"{figures['samples']:,}", f"{figures['steps']:,}", loss, f"{figures['minutes']:.1f}")
    return table
