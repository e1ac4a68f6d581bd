"""Runs a curriculum: a corpus, the models around the transformer, then stage after stage, each from the last one's
weights; what an earlier, interrupted run finished is not done again.

    OUT/curriculum.json                 what was asked for
    OUT/corpus/                         records that were made here, where no data is named
    OUT/vae/  OUT/model/                the autoencoder's run, and the models around the transformer
    OUT/stages/NAME/selection.parquet   which records a stage trains on
    OUT/stages/NAME/samples/            the same, encoded
    OUT/stages/NAME/transformer/        the stage's run
    OUT/diffusers/  OUT/report.json     the last stage's model, and the figures of all
"""

import pathlib
import time
from typing import Any

import jax
import ml_collections
from rich.console import Console
from rich.table import Table

from data_pipeline.buckets import Resolutions
from data_pipeline.records.shards import MANIFEST, RecordFolder
from data_pipeline.samples.cache import Cache, StreamKey
from data_pipeline.samples.held_out import is_held
from data_pipeline.selection.index import INDEX, read_selection, write_selection
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax import sequence
from qi2_jax.config import loading as configs
from qi2_jax.config import recorded
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.interop import folder
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import lock, processes
from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.tasks.autoencoder.config import check_vae
from qi2_jax.tasks.autoencoder.task import train_vae
from qi2_jax.tasks.transformer import start
from qi2_jax.tasks.transformer.config import check_transformer, shares_of, transformer_config
from qi2_jax.tasks.transformer.task import train_transformer
from qi2_jax.training import loop, restarting
from qi2_jax.training.telemetry import metrics
from qi2_jax.workflows import data, demo, encode, export
from qi2_jax.workflows.changes import allowed_changes, check_accepted, is_begun
from qi2_jax.workflows.corpus import check_fonts, make_corpus


def run(
    config: Any,
    out: pathlib.Path,
    records: pathlib.Path | None = None,
    *,
    accept_changes: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Trains all stages of a curriculum and exports the last one's model.

    Args:
      config: see `experiments/qwen_image_2/curriculum.py`.
      out: receives everything, see above.
      records: folder of scored records; None: `config.corpus` says what is made instead.
      accept_changes: continue although the config is another one; what is made already stays as it is.
      restart: see `loop.train`.

    Returns:
      The figures of the report.

    Raises:
      ValueError: if `out` was begun with another config or other data, a stage has nothing to train on, or a value
        cannot work; as far as possible before anything is done.
    """
    if not demo.is_ours(out, paths.CURRICULUM, config.get("compilation_cache", "")):
        raise ValueError(f"{out} holds something that no curriculum made; choose an empty or new folder")
    if records is not None and not (records / MANIFEST).is_file():
        raise ValueError(
            f"{records} is no folder of records: `qi2 data ingest` makes one, and `qi2 data score` scores it"
        )
    _check(config, out)
    with processes.agreed():
        if jax.process_index() == 0 and records is None:
            check_fonts(config.corpus, out / paths.CORPUS)
    with lock.hold(out):
        return _run(config, out, records, accept_changes, restart)


def _ordered(config: Any) -> dict[str, Any]:
    """The stages by name, in the order in which they are trained; a config does not keep that of its keys."""
    return {name: config.stages[name] for name in config.order}


def _check(config: Any, out: pathlib.Path) -> None:
    if not config.order or sorted(config.order) != sorted(config.stages):
        raise ValueError(f"order is {config.order}; it must name each of the stages {sorted(config.stages)} once")
    for name, stage in config.stages.items():
        try:
            encode.check(stage.encode)
            check_transformer(stage.transformer, stage.data)
            Resolutions.of_config(stage.data)
            Thresholds(**stage.data.thresholds)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
        if begins := stage.transformer.start.folder:
            raise ValueError(
                f"stages.{name}.transformer.start.folder is {begins}, but a stage begins with the weights of the one "
                "before it; name those of the first stage with start.folder"
            )
    first = config.stages[config.order[0]].transformer
    if not is_begun(out, config.order[0]):  # else it needs its beginning no more
        if first.lora.rank and not config.start.folder:
            raise ValueError(
                f"stages.{config.order[0]}.transformer.lora.rank is {first.lora.rank}: name the transformer to adapt "
                "with start.folder"
            )
        if config.start.folder:
            locating.locate(config.start.folder)
    fractions = {name: stage.data.held_out for name, stage in config.stages.items()}
    if len(set(fractions.values())) > 1:
        raise ValueError(f"data.held_out differs: {fractions}; a stage would train on what another holds out")
    _check_one_model(_ordered(config))
    if config.model.folder:
        if not (locating.model_of(pathlib.Path(config.model.folder)) / folder.MARK).is_file():
            here = (
                f", or go on with model.folder={out / paths.MODEL}"
                if (out / paths.MODEL / folder.MARK).is_file()
                else ""
            )
            raise ValueError(f"model.folder {config.model.folder} is no model folder; `qi2 import` makes one{here}")
    elif config.platform != "cpu" and not config.encoder.folder:
        raise ValueError(
            "name the condition encoder with model.folder or encoder.folder: a random one is for CPUs only"
        )
    else:
        model_folder.check_encoder(config.encoder, out / paths.MODEL)
        check_vae(config.vae)


def _check_one_model(all_stages: Any) -> None:
    """Refuses stages of other models or time shifts: each begins with the last one's weights, and one shift is
    exported with them."""

    def of(stage: Any) -> dict[str, Any]:
        transformer = configs.to_dict(stage.transformer)
        return {"model": transformer["model"], "timesteps": {"shift": transformer["timesteps"]["shift"]}}

    (first, expected), *others = [(name, of(stage)) for name, stage in all_stages.items()]
    for name, found in others:
        if differing := recorded.difference(expected, found):
            raise ValueError(
                f"stages.{name}.transformer differs from stages.{first}: {'; '.join(differing)}. All stages train one "
                "model with one time shift; give them the same"
            )


def _run(
    config: Any, out: pathlib.Path, records: pathlib.Path | None, accept_changes: bool, restart: bool
) -> dict[str, Any]:
    begun, console = time.monotonic(), Console(quiet=jax.process_index() != 0)
    first_process = jax.process_index() == 0
    asked = {"records": str(records.absolute()) if records else "made here", **configs.to_dict(config)}
    ordered = _ordered(config)
    for name in ordered:  # before another config is recorded
        restarting.check(out / paths.STAGES / name / paths.TRANSFORMER, restart=restart)
    with processes.agreed():
        may_change = allowed_changes(config, out)
        if accept_changes:
            check_accepted(config, out, asked, may_change)
            may_change = ("",)
        more = "" if accept_changes else loop.ACCEPT
        changes = recorded.claim(out / paths.CURRICULUM, asked, may_change, write=first_process, more=more)
    if changes:
        told = "this curriculum goes on with another config; what is made already stays as it is:\n  "
        console.print(told + "\n  ".join(changes))

    console.rule("data")
    name, first = next(iter(ordered.items()))
    with processes.agreed():
        if first_process:
            if records is None:
                make_corpus(config.corpus, out / paths.CORPUS, console)
            for stage_name, stage in ordered.items():  # now: what the last lacks would cost all before it
                console.print(f"data of stage {stage_name}")
                _select(stage, records or out / paths.CORPUS / "records", out / paths.STAGES / stage_name, console)
    records = records or out / paths.CORPUS / "records"

    console.rule("models around the transformer")
    model = out / paths.MODEL
    with processes.agreed():
        if first_process and config.model.folder:
            model_folder.adopt(locating.model_of(pathlib.Path(config.model.folder)), model)
        elif first_process:
            model_folder.make_encoder(config.encoder, model)
    if not config.model.folder:
        index = out / paths.STAGES / name / INDEX
        kept = [row for row in read_selection(index) if not row.conditions]
        pictures = data.pictures(records, kept, Resolutions.of_config(first.data), config.vae.channels)
        train_vae(
            config.vae,
            pictures,
            out / paths.VAE,
            model,
            held_out=first.data.held_out,
            accept_changes=accept_changes,
            restart=restart,
        )

    source = pathlib.Path(config.start.folder) if config.start.folder else None
    figures: dict[str, Any] = {}
    for number, (name, stage) in enumerate(ordered.items(), start=1):
        console.rule(f"stage {number} of {len(ordered)}: {name}")
        place = out / paths.STAGES / name
        source, figures[name] = _stage(stage, records, model, place, source, console, accept_changes, restart)
    assert source is not None

    console.rule("export")
    figures = {"stages": figures, "minutes": (time.monotonic() - begun) / 60}
    with processes.agreed():
        if first_process:
            write_json_atomic(out / "report.json", figures)
            if stage.transformer.model.attention == sequence.BLOCK_CAUSAL:
                export.export(source, out / "diffusers")
            else:
                console.print(f"{export.NOT_EXPORTED}; `qi2 sample {out}` draws with it")
    console.print(_table(figures, out))
    return figures


def _select(stage: Any, records: pathlib.Path, out: pathlib.Path, console: Console) -> None:
    """The selection of a stage; one that is there is used again."""
    index = out / INDEX
    if not index.is_file():
        selection = select(records, Thresholds(**stage.data.thresholds))
        console.print(selection.table())
        out.mkdir(parents=True, exist_ok=True)
        write_selection(index, selection)
    missing, held_out = set(shares_of(stage.data).weights()), stage.data.held_out
    missing |= {key._replace(held=True) for key in missing if held_out}
    resolutions, stored = Resolutions.of_config(stage.data), RecordFolder(records)
    for row in read_selection(index):
        if not missing:
            return
        fits = resolutions.fits(row.width, row.height)
        keys = {StreamKey(side, row.conditions) for side, fit in fits if fit.left_out is None}
        if missing & {*keys, *(key._replace(held=True) for key in keys)}:  # else its pictures need not be read
            held = held_out > 0 and is_held(stored[row.index], held_out)
            missing -= {key._replace(held=held) for key in keys}
    if missing:
        raise ValueError(
            f"{index} has nothing for {sorted(map(str, missing))} (side-conditions, held for validation), to which "
            f"data.mixture gives steps; give these no share, bring such records, or change data.held_out ({held_out})"
        )


def _stage(
    stage: Any,
    records: pathlib.Path,
    model: pathlib.Path,
    out: pathlib.Path,
    source: pathlib.Path | None,
    console: Console,
    accept_changes: bool,
    restart: bool,
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Selects, encodes and trains; returns the stage's run and its figures."""
    begun, run = time.monotonic(), out / paths.TRANSFORMER
    for _ in range(2):  # after the first time every process has written its units, and the cache can be completed
        with processes.agreed():
            encoded = encode.encode(stage, records, out / INDEX, model, out / paths.SAMPLES)
    assert encoded is not None
    console.print(encoded.table())
    samples = Cache(out / paths.SAMPLES)
    with processes.agreed():
        if jax.process_index() == 0:
            if not (model / folder.MARK).is_file():
                model_folder.finish(
                    model,
                    transformer_config(stage.transformer, samples),
                    Shift(**stage.transformer.timesteps.shift),
                )
            start.give_model(stage.transformer, samples, model, run)
    # Of a stage that is trained, this makes sure that its last checkpoint is whole and no end of a failure.
    train_transformer(_started(stage, source), samples, run, accept_changes=accept_changes, restart=restart)
    losses = [line["validation_loss"] for line in metrics.lines(run / metrics.FILE) if "validation_loss" in line]
    return run, {
        "samples": len(samples),
        "steps": stage.transformer.train.steps,
        "validation_loss_before": losses[0] if losses else None,
        "validation_loss_after": losses[-1] if losses else None,
        "minutes": (time.monotonic() - begun) / 60,
    }


def _started(stage: Any, source: pathlib.Path | None) -> Any:
    """A stage that begins with the weights of a run."""
    changed = ml_collections.ConfigDict(stage)
    changed.transformer.start.folder = str(source) if source else ""
    return ml_collections.FrozenConfigDict(changed)


def _table(figures: dict[str, Any], out: pathlib.Path) -> Table:
    table = Table(title=f"curriculum in {out}, {figures['minutes']:.1f} min for this call")
    for column in ("stage", "samples", "steps", "validation loss, before -> after", "min"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, own in figures["stages"].items():
        losses = own["validation_loss_before"], own["validation_loss_after"]
        loss = " -> ".join("unknown" if value is None else f"{value:.3f}" for value in losses)
        table.add_row(name, f"{own['samples']:,}", f"{own['steps']:,}", loss, f"{own['minutes']:.1f}")
    return table
