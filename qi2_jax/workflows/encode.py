"""Encodes the selected records of a stage into samples: the step between data and training."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable

import jax

from data_pipeline.records.shards import RecordFolder, digest_of
from data_pipeline.samples import encoding
from data_pipeline.samples.cache import MANIFEST, Cache, held_out_rule
from data_pipeline.samples.held_out import BY_IMAGES, hold_out_of
from data_pipeline.selection.index import selection_facts
from qi2_jax.config.changes import differences
from qi2_jax.inference import encoders
from qi2_jax.interop import components
from qi2_jax.runs import locating
from qi2_jax.tasks.devices import make_mesh
from qi2_jax.workflows.config import StageExperiment


def encode(
    config: StageExperiment,
    folder: pathlib.Path,
    index: pathlib.Path,
    model: pathlib.Path,
    out: pathlib.Path,
    others: Iterable[pathlib.Path] = (),
) -> encoding.EncodeReport | None:
    """Encodes a selection of records into a cache. A complete cache is reused, and an interrupted one is continued.

    Args:
      config: config with the groups `data` and `encode`.
      folder: folder of the records.
      index: selection of the records.
      model: model folder, or run with one, whose encoders are used.
      out: folder of the cache.
      others: other caches of the same curriculum, whose hold-out rule a new cache follows.

    Returns:
      A report; None while other processes still have units to write.

    Raises:
      ValueError: if the selection was made from other records or with other thresholds, the cache from other
        inputs, or nothing is left to encode.
    """
    config.encode.check()
    facts, records = selection_facts(index), RecordFolder(folder)
    if facts.get("records") != digest_of(records.shards):
        raise ValueError(f"{index} was selected from other records than those in {folder}; select again")
    thresholds = json.loads(json.dumps(dataclasses.asdict(config.data.thresholds)))
    if changes := differences(facts.get("thresholds", {}), thresholds):
        raise ValueError(f"{index} was selected with other thresholds; select again: {'; '.join(map(str, changes))}")
    model = locating.model_of(model)
    made_by = encoders.digests(model) | _settings(config, model)
    rule = held_out_rule([out, *others])
    if (out / MANIFEST).is_file():
        Cache(out, encoding.fingerprint(records, index, config.data, made_by, rule or BY_IMAGES))
        return encoding.report(out, len(records))
    held_out = hold_out_of(records, config.data.held_out, rule)
    return encoding.encode(
        folder,
        index,
        config.data.resolutions,
        encoders.Encoders(
            model,
            make_mesh(config.encode.mesh, jax.local_devices()),
            config.encode.dtype,
            config.encode.batch_size,
            config.encode.online,
        ),
        out,
        encoding.fingerprint(records, index, config.data, made_by, held_out.rule),
        records_per_unit=config.encode.records_per_unit,
        held_out=held_out,
        process=(jax.process_index(), jax.process_count()),
    )


def _settings(config: StageExperiment, model: pathlib.Path) -> dict[str, str | int]:
    """The settings that samples depend on, besides the encoders' weights and the data, as plain JSON."""
    return {
        "dtype": config.encode.dtype.name,
        "online": config.encode.online,
        # Widths of the features and latents, also of those that training computes.
        "text_width": components.read_config(model / "text_encoder", "text_encoder").text.hidden_size,
        "latent_channels": components.read_config(model / "vae", "vae").latent_channels,
        "records_per_unit": config.encode.records_per_unit,  # decides which records an existing unit contains
    }
