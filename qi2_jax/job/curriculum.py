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

from data_pipeline import cascade
from data_pipeline.atomic import write_json_atomic
from data_pipeline.buckets import Resolutions
from data_pipeline.cache import Cache, StreamKey
from data_pipeline.demo_cutouts import write_cutouts
from data_pipeline.demo_set import write_demo_folder
from data_pipeline.held import is_held
from data_pipeline.ingest import ingest
from data_pipeline.selection import Thresholds, read_selection, select, write_selection
from data_pipeline.shards import MANIFEST, RecordFolder
from data_pipeline.synthesis.edits import synthesize_edits
from data_pipeline.synthesis.fonts import FontLibrary
from data_pipeline.synthesis.scripts import find_scripts
from data_pipeline.synthesis.text import synthesize_text
from qi2_jax import config as configs
from qi2_jax import lock, processes, runs, sequence
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.encoders import digests
from qi2_jax.interop import folder
from qi2_jax.job import data, encode, main, models, stages, transformer
from qi2_jax.training import checkpoint, loop, metrics

CORPUS, VAE, SAMPLES, INDEX = "corpus", "vae", "samples", "selection.parquet"
SCRIPTS = ("Latn", "Hans")  # of the texts in pictures that are made here


def run(
    config: Any, out: pathlib.Path, records: pathlib.Path | None = None, *, accept_changes: bool = False
) -> dict[str, Any]:
    """Trains all stages of a curriculum and exports the last one's model.

    Args:
      config: see `experiments/qwen_image_2/curriculum.py`.
      out: receives everything, see above.
      records: folder of scored records; None: `config.corpus` says what is made instead.
      accept_changes: continue although the config is another one; what is made already stays as it is.

    Returns:
      The figures of the report.

    Raises:
      ValueError: if `out` was begun with another config or other data, a stage has nothing to train on, or a value
        cannot work; as far as possible before anything is done.
    """
    if not main.is_ours(out, runs.CURRICULUM, config.get("compilation_cache", "")):
        raise ValueError(f"{out} holds something that no curriculum made; choose an empty or new folder")
    if records is not None and not (records / MANIFEST).is_file():
        raise ValueError(
            f"{records} is no folder of records: `qi2 data ingest` makes one, and `qi2 data score` scores it"
        )
    _check(config, out)
    with processes.agreed():
        if jax.process_index() == 0 and records is None:
            _check_fonts(config.corpus, out / CORPUS)
    with lock.hold(out):
        return _run(config, out, records, accept_changes)


def _ordered(config: Any) -> dict[str, Any]:
    """The stages by name, in the order in which they are trained; a config does not keep that of its keys."""
    return {name: config.stages[name] for name in config.order}


def _check(config: Any, out: pathlib.Path) -> None:
    if not config.order or sorted(config.order) != sorted(config.stages):
        raise ValueError(f"order is {config.order}; it must name each of the stages {sorted(config.stages)} once")
    for name, stage in config.stages.items():
        try:
            encode.check(stage.encode)
            stages.check_transformer(stage.transformer, stage.data)
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
    if not _is_begun(out, config.order[0]):  # else it needs its beginning no more
        if first.lora.rank and not config.start.folder:
            raise ValueError(
                f"stages.{config.order[0]}.transformer.lora.rank is {first.lora.rank}: name the transformer to adapt "
                "with start.folder"
            )
        if config.start.folder:
            runs.locate(config.start.folder)
    fractions = {name: stage.data.held_out for name, stage in config.stages.items()}
    if len(set(fractions.values())) > 1:
        raise ValueError(f"data.held_out differs: {fractions}; a stage would train on what another holds out")
    _check_one_model(_ordered(config))
    if config.model.folder:
        if not (runs.model_of(pathlib.Path(config.model.folder)) / folder.MARK).is_file():
            here = (
                f", or go on with model.folder={out / runs.MODEL}" if (out / runs.MODEL / folder.MARK).is_file() else ""
            )
            raise ValueError(f"model.folder {config.model.folder} is no model folder; `qi2 import` makes one{here}")
    elif config.platform != "cpu" and not config.encoder.folder:
        raise ValueError(
            "name the condition encoder with model.folder or encoder.folder: a random one is for CPUs only"
        )
    else:
        models.check_encoder(config.encoder, out / runs.MODEL)
        stages.check_vae(config.vae)


def _check_one_model(all_stages: Any) -> None:
    """Refuses stages of other models or time shifts: each begins with the last one's weights, and one shift is
    exported with them."""

    def of(stage: Any) -> dict[str, Any]:
        transformer = configs.to_dict(stage.transformer)
        return {"model": transformer["model"], "timesteps": {"shift": transformer["timesteps"]["shift"]}}

    (first, expected), *others = [(name, of(stage)) for name, stage in all_stages.items()]
    for name, found in others:
        if differing := configs.difference(expected, found):
            raise ValueError(
                f"stages.{name}.transformer differs from stages.{first}: {'; '.join(differing)}. All stages train one "
                "model with one time shift; give them the same"
            )


def _run(config: Any, out: pathlib.Path, records: pathlib.Path | None, accept_changes: bool) -> dict[str, Any]:
    begun, console = time.monotonic(), Console(quiet=jax.process_index() != 0)
    first_process = jax.process_index() == 0
    asked = {"records": str(records.absolute()) if records else "made here", **configs.to_dict(config)}
    ordered = _ordered(config)
    with processes.agreed():
        may_change = _may_change(config, out)
        if accept_changes:
            _check_accepted(config, out, asked, may_change)
            may_change = ("",)
        more = "" if accept_changes else loop.ACCEPT
        changes = configs.claim(out / runs.CURRICULUM, asked, may_change, write=first_process, more=more)
    if changes:
        told = "this curriculum goes on with another config; what is made already stays as it is:\n  "
        console.print(told + "\n  ".join(changes))

    console.rule("data")
    name, first = next(iter(ordered.items()))
    with processes.agreed():
        if first_process:
            if records is None:
                _corpus(config.corpus, out / CORPUS, console)
            for stage_name, stage in ordered.items():  # now: what the last lacks would cost all before it
                console.print(f"data of stage {stage_name}")
                _select(stage, records or out / CORPUS / "records", out / runs.STAGES / stage_name, console)
    records = records or out / CORPUS / "records"

    console.rule("models around the transformer")
    model = out / runs.MODEL
    with processes.agreed():
        if first_process and config.model.folder:
            models.adopt(runs.model_of(pathlib.Path(config.model.folder)), model)
        elif first_process:
            models.make_encoder(config.encoder, model)
    if not config.model.folder:
        index = out / runs.STAGES / name / INDEX
        kept = [row for row in read_selection(index) if not row.conditions]
        pictures = data.pictures(records, kept, Resolutions.of_config(first.data), config.vae.channels)
        stages.train_vae(config.vae, pictures, out / VAE, model, accept_changes=accept_changes)

    source = pathlib.Path(config.start.folder) if config.start.folder else None
    figures: dict[str, Any] = {}
    for number, (name, stage) in enumerate(ordered.items(), start=1):
        console.rule(f"stage {number} of {len(ordered)}: {name}")
        place = out / runs.STAGES / name
        source, figures[name] = _stage(stage, records, model, place, source, console, accept_changes)
    assert source is not None

    console.rule("export")
    figures = {"stages": figures, "minutes": (time.monotonic() - begun) / 60}
    with processes.agreed():
        if first_process:
            write_json_atomic(out / "report.json", figures)
            if stage.transformer.model.attention == sequence.BLOCK_CAUSAL:
                main.export(source, out / "diffusers")
            else:
                console.print(f"{main.NOT_EXPORTED}; `qi2 sample {out}` draws with it")
    console.print(_table(figures, out))
    return figures


# Paths and machines: what they lead to is checked by digests where it is read. Where the first stage begins no longer
# matters when it has begun.
ALWAYS_FREE = ("compilation_cache", "records", "start.", "corpus.workers")
FREE_OF_A_STAGE = (
    "compilation_cache",
    "encode.batch_size",
    "encode.mesh.",
    *(f"transformer.{key}" for key in loop.MAY_CHANGE),
)
# Groups of a stage's config on which its samples depend, and of its `transformer` those on which the model does.
MAKES_SAMPLES, MAKES_A_MODEL = ("data", "encode"), ("model", "timesteps.shift", "lora")
# Where a stage ends cannot change when the next one has begun from there.
FROZEN_BY_THE_NEXT = "transformer.train."


def _run_of(out: pathlib.Path, name: str) -> pathlib.Path:
    return out / runs.STAGES / name / runs.TRANSFORMER


def _is_begun(out: pathlib.Path, name: str) -> bool:
    return bool(checkpoint.steps(_run_of(out, name) / runs.CHECKPOINTS))


def _begun(config: Any, out: pathlib.Path) -> dict[str, bool]:
    """Which stages have a checkpoint.

    Raises:
      ValueError: if one has, and one before it has none: it began with other weights, or such that are no more.
    """
    begun = {name: _is_begun(out, name) for name in config.order}
    count = next((number for number, own in enumerate(begun.values()) if not own), len(begun))
    if later := ", ".join(str(_run_of(out, name)) for name in config.order[count:] if begun[name]):
        old, new, lost = runs.order_of(out), list(config.order), config.order[count]
        if old[: count + 1] != new[: count + 1] and old:
            raise ValueError(
                f"order: {old} -> {new}: {lost}, which has no checkpoint, would stand before stages that have; take "
                f"this back, or let them begin anew (delete {later})"
            )
        raise ValueError(
            f"stage {lost} has no checkpoint, but later ones have, which began with its weights (delete {later}, or "
            f"bring back {_run_of(out, lost)} from a copy)"
        )
    return begun


def _is_moved(config: Any, out: pathlib.Path) -> bool:
    """Whether `model.folder` is another than before, and holds the same models as those that are used."""
    record = configs.claimed(out / runs.CURRICULUM) if (out / runs.CURRICULUM).is_file() else {}
    if record.get("model", {}).get("folder") == config.model.folder:
        return False  # hundreds of seconds for a large encoder
    try:
        return digests(runs.model_of(pathlib.Path(config.model.folder))) == digests(out / runs.MODEL)
    except OSError:  # of files that are not there
        return False


def _may_change(config: Any, out: pathlib.Path) -> tuple[str, ...]:
    """Beginnings of the keys that another call may change: those from which nothing is made yet, and what no result
    depends on."""
    free = [*ALWAYS_FREE, *(f"vae.{key}" for key in loop.MAY_CHANGE)]
    if not (out / CORPUS).exists():
        free += ["corpus."]
    if not (out / runs.MODEL).exists():
        free += ["encoder.", "model."]
    elif config.model.folder:
        free += ["encoder.", "vae."]  # which nothing reads
        if _is_moved(config, out):
            free += ["model."]
    if not checkpoint.steps(out / VAE / runs.CHECKPOINTS) and not (out / runs.MODEL / "vae").exists():
        free += ["vae."]
    begun = _begun(config, out)
    for name, later in zip(begun, [*list(begun.values())[1:], False], strict=True):
        own = [key for key in FREE_OF_A_STAGE if not later or key != FROZEN_BY_THE_NEXT]
        if not begun[name]:
            own += ["transformer."]
        if not (out / runs.STAGES / name).exists():
            own += [""]
        free += [f"stages.{name}.{key}" for key in own]
    count = sum(begun.values())
    if count == 0 or runs.order_of(out)[:count] == list(config.order[:count]):  # more may follow, or others
        free += ["order:"]
    return tuple(free)


def _check_accepted(config: Any, out: pathlib.Path, asked: dict[str, Any], free: tuple[str, ...]) -> None:
    """Refuses changes with which what is made could not go on, or would not be of one model, before they are noted."""
    old, new = runs.order_of(out), list(config.order)
    same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))

    def trained(names: list[str]) -> list[pathlib.Path]:
        return [place for name in dict.fromkeys(names) if (place := _run_of(out, name)).exists()]

    # {beginning of keys: what was made with them, and from that}
    redo = {
        "corpus.": [out / CORPUS, out / runs.STAGES],
        "encoder.": [out / runs.MODEL, out / runs.STAGES],
        "model.": [out / runs.MODEL, out / runs.STAGES],
        "vae.model.": [out / VAE, out / runs.MODEL, out / runs.STAGES],
        "vae.channels:": [out / VAE, out / runs.MODEL, out / runs.STAGES],
        "order:": trained([*old[same:], *new[same:]]),
    }
    for number, name in enumerate(new, start=1):
        later = trained(new[number:])
        redo |= {f"stages.{name}.{key}.": [out / runs.STAGES / name, *later] for key in MAKES_SAMPLES}
        redo |= {f"stages.{name}.transformer.{key}.": [_run_of(out, name), *later] for key in MAKES_A_MODEL}
        if later:
            redo[f"stages.{name}.transformer.train.steps:"] = later
    free += tuple(f"stages.{name}.data.mixture." for name in new)
    refused = [
        f"{line} (delete {', '.join(map(str, paths))})"
        for line in configs.changes(out / runs.CURRICULUM, asked)
        for begins, paths in redo.items()
        if line.startswith(begins) and not line.startswith(free)
    ]
    if refused:
        raise ValueError(
            f"what is made in {out} cannot go on with these changes; take them back, or delete what was made with "
            "others:\n  " + "\n  ".join(refused)
        )


def _check_fonts(config: Any, out: pathlib.Path) -> None:
    """Refuses a corpus that is still to be made where the fonts of its texts are missing; edits write texts, too."""
    asked = {"edits": config.edits, "texts": config.texts}
    made = (out / "records" / MANIFEST).is_file()
    if not made and any(count and not (out / name / MANIFEST).is_file() for name, count in asked.items()):
        more = (
            " (`make test-data` does), bring records of your own with --data, or make none with corpus.edits=0 "
            "corpus.texts=0, where no stage gives edits a share"
        )
        FontLibrary(find_scripts(SCRIPTS), more=more)


def _corpus(config: Any, out: pathlib.Path, console: Console) -> None:
    """Scored records of the embedded pictures, of edits made from them, and of text-rich pictures."""
    records = out / "records"
    workers = config.workers or None
    if not (records / MANIFEST).is_file():
        sources = [
            out / "pictures",
            *([out / "edits"] if config.edits else []),
            *([out / "texts"] if config.texts else []),
        ]
        if not (sources[0] / MANIFEST).is_file():
            if not (out / "demo_set" / "metadata.jsonl").is_file():
                write_demo_folder(out / "demo_set")
            console.print(ingest(out / "demo_set", sources[0]).table())
        if config.edits and not (out / "edits" / MANIFEST).is_file():
            write_cutouts(out / "cutouts")
            licence = "drawn by qi2 (Apache-2.0)"
            edits = synthesize_edits(
                sources[0],
                out / "edits",
                count=config.edits,
                cutouts=out / "cutouts",
                cutouts_licence=licence,
                max_side=config.side,
                workers=workers,
            )
            console.print(edits.table())
        if config.texts and not (out / "texts" / MANIFEST).is_file():
            texts = synthesize_text(
                out / "texts", count=config.texts, side=config.side, scripts=SCRIPTS, workers=workers
            )
            for table in texts.tables():
                console.print(table)
        console.print(ingest(sources, records).table())
    cascade.score(records, workers=workers)


def _select(stage: Any, records: pathlib.Path, out: pathlib.Path, console: Console) -> None:
    """The selection of a stage; one that is there is used again."""
    index = out / INDEX
    if not index.is_file():
        selection = select(records, Thresholds(**stage.data.thresholds))
        console.print(selection.table())
        out.mkdir(parents=True, exist_ok=True)
        write_selection(index, selection)
    missing, held_out = set(stages.shares_of(stage.data).weights()), stage.data.held_out
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
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Selects, encodes and trains; returns the stage's run and its figures."""
    begun, run = time.monotonic(), out / runs.TRANSFORMER
    for _ in range(2):  # after the first time every process has written its units, and the cache can be completed
        with processes.agreed():
            encoded = encode.encode(stage, records, out / INDEX, model, out / SAMPLES)
    assert encoded is not None
    console.print(encoded.table())
    samples = Cache(out / SAMPLES)
    with processes.agreed():
        if jax.process_index() == 0:
            if not (model / folder.MARK).is_file():
                models.finish(
                    model,
                    transformer.transformer_config(stage.transformer, samples),
                    Shift(**stage.transformer.timesteps.shift),
                )
            transformer.give_model(stage.transformer, samples, model, run)
    # Of a stage that is trained, this makes sure that its last checkpoint is whole and no end of a failure.
    transformer.train_transformer(_started(stage, source), samples, run, accept_changes=accept_changes)
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
