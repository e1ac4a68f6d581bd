"""Encodes what a config selects: the step between data and training, of a job and of `qi2 data cache`."""

import pathlib
from typing import Any

import jax

from data_pipeline.buckets import Resolutions
from data_pipeline.records.shards import RecordFolder, digest_of
from data_pipeline.samples import encoding
from data_pipeline.samples.cache import MANIFEST, Cache
from data_pipeline.samples.schema import ONLINE
from data_pipeline.selection.index import selection_facts
from qi2_jax import sharding
from qi2_jax.config import loading as configs
from qi2_jax.config import recorded
from qi2_jax.inference import encoders
from qi2_jax.interop import components
from qi2_jax.runs import locating
from qi2_jax.tasks import keys
from qi2_jax.tasks.stages import dtype_of, mesh_of


def check(config: Any) -> None:
    """Raises a ValueError for a key or value with which nothing can be encoded."""
    keys.check("encode", config, keys.ENCODE)
    dtype_of(config.dtype)
    if config.online not in ONLINE:
        raise ValueError(f"encode.online is {config.online!r}; choose one of {ONLINE}")
    if config.records_per_unit < 1:
        raise ValueError(f"encode.records_per_unit is {config.records_per_unit}; it must be at least 1")
    try:
        sharding.own_rows(mesh_of(config.mesh, jax.local_devices()), config.batch_size)
    except ValueError as error:
        raise ValueError(f"encode: {error}") from None


def encode(
    config: Any, folder: pathlib.Path, index: pathlib.Path, model: pathlib.Path, out: pathlib.Path
) -> encoding.EncodeReport | None:
    """Encodes a selection of records into a cache; one that is complete is used again, an interrupted one continued.

    Args:
      config: with the groups `data` and `encode`.
      folder, index: the records, and their selection.
      model: a model folder, or a run with one.
      out: the cache.

    Returns:
      None while other processes still have units to write.

    Raises:
      ValueError: if the selection was made of other records or with other thresholds than the config's, the cache from
        something else, or nothing is left to encode.
    """
    check(config.encode)
    facts, records = selection_facts(index), RecordFolder(folder)
    if facts.get("records") != digest_of(records.shards):
        raise ValueError(f"{index} was selected from other records than those in {folder}; select again")
    if differing := recorded.difference(facts.get("thresholds", {}), configs.to_dict(config.data.thresholds)):
        raise ValueError(f"{index} was selected with other thresholds; select again: {'; '.join(differing)}")
    model = locating.model_of(model)
    width = components.read_config(model / "text_encoder", "text_encoder").text.hidden_size
    channels = components.read_config(model / "vae", "vae").latent_channels
    how = {"dtype": config.encode.dtype, "online": config.encode.online}
    how |= {"text_width": width, "latent_channels": channels}  # of what is computed online, too
    how["records_per_unit"] = config.encode.records_per_unit  # which records a unit that is there already holds
    made_from = encoding.fingerprint(records, index, config.data, encoders.digests(model) | how)
    if (out / MANIFEST).is_file():
        Cache(out, made_from)
        return encoding.report(out, len(records))
    return encoding.encode(
        folder,
        index,
        Resolutions.of_config(config.data),
        encoders.Encoders(
            model,
            mesh_of(config.encode.mesh, jax.local_devices()),
            dtype_of(config.encode.dtype),
            config.encode.batch_size,
            config.encode.online,
        ),
        out,
        made_from,
        records_per_unit=config.encode.records_per_unit,
        held_out=config.data.held_out,
        process=(jax.process_index(), jax.process_count()),
    )
