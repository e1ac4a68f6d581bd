"""Trains the autoencoder alone: selects images from records, and trains on crops of them.

OUT/selection.parquet                        the records on which it trains
OUT/config.json  metrics.jsonl  checkpoints/ the run
OUT/model/vae/                               the trained autoencoder with the statistics of its latents
"""

import dataclasses
import json
import pathlib

import jax

from data_pipeline.config import DataConfig
from data_pipeline.records.shards import MANIFEST, RecordFolder, digest_of
from data_pipeline.selection.index import INDEX, read_selection, selection_facts, write_selection
from data_pipeline.selection.select import select
from qi2_jax.runs import paths
from qi2_jax.runtime import lock, processes
from qi2_jax.tasks.autoencoder import networks
from qi2_jax.tasks.autoencoder.config import check_autoencoder
from qi2_jax.tasks.autoencoder.task import train_autoencoder
from qi2_jax.training import restarting
from qi2_jax.workflows import reports
from qi2_jax.workflows.config import AutoencoderExperiment
from qi2_jax.workflows.data import images_of
from qi2_jax.workflows.reports import Show


def train(
    config: AutoencoderExperiment,
    records: pathlib.Path,
    out: pathlib.Path,
    *,
    accept_changes: bool = False,
    restart: bool = False,
    show: Show = reports.ignore,
) -> None:
    """Trains the autoencoder on the targets of selected records, or resumes where an earlier call stopped.

    Args:
      config: see `experiments/qwen_image_2/autoencoder.py`.
      records: folder of scored records.
      out: folder of the run.
      accept_changes: see `loop.train`.
      restart: see `loop.train`.
      show: function that draws the report of a new selection, in process 0.

    Raises:
      ValueError: if the folder has no records that fit, and as `loop.train`.
    """
    if not (records / MANIFEST).is_file():
        raise ValueError(
            f"{records} is not a folder of records: `qi2 data ingest` makes one, and `qi2 data score` scores it"
        )
    check_autoencoder(config.vae)
    networks.check_folders(config.vae.perceptual, config.vae.alignment)
    with lock.hold(out):
        restarting.check(out, restart=restart)
        index = out / INDEX
        with processes.raise_together():
            if jax.process_index() == 0:
                _select(config.data, records, index, show)
        with processes.raise_together():
            kept = [row for row in read_selection(index) if not row.conditions]
            images = images_of(records, kept, config.data.resolutions, config.vae.channels)
            if not len(images):
                raise ValueError(
                    f"no image of {records} is left after selection and buckets, see {index}; relax data.thresholds, "
                    "data.sides or data.max_cropped, or add images"
                )
        train_autoencoder(
            config.vae,
            images,
            out,
            out / paths.MODEL,
            held_out=config.data.held_out,
            accept_changes=accept_changes,
            restart=restart,
        )


def _select(data: DataConfig, records: pathlib.Path, index: pathlib.Path, show: Show) -> None:
    """Selects records, unless the existing selection is that of these records with these thresholds."""
    if index.is_file():
        facts = selection_facts(index)
        thresholds = json.loads(json.dumps(dataclasses.asdict(data.thresholds)))
        made_from = facts.get("records"), facts.get("thresholds")
        if made_from == (digest_of(RecordFolder(records).shards), thresholds):
            return
    selection = select(records, data.thresholds, without_captions=True)
    show(selection.table())
    write_selection(index, selection)
