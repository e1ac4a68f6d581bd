"""The start of a run: its encoders and the weights of its transformer."""

import logging
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipeline.samples.cache import Cache
from qi2_jax import sharding
from qi2_jax.inference import encoders
from qi2_jax.interop import folder, stored_weights
from qi2_jax.interop.lora import merging, reading
from qi2_jax.models import tree
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.tasks.transformer.config import TransformerConfig, model_config_for
from qi2_jax.training import restarting
from qi2_jax.training.checkpoints import files
from qi2_jax.training.step import TrainState

log = logging.getLogger(__name__)


def prepare_model_folder(
    config: TransformerConfig, samples: Cache, source: pathlib.Path | None, out: pathlib.Path
) -> None:
    """Copies the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: config of the transformer stage.
      samples: samples that the run trains on.
      source: model folder, or run or job with one; None: model folder of the job that the samples belong to, if any.
      out: folder of the run.

    Raises:
      ValueError: if the source is not a model folder, or its encoders did not make these samples.
    """
    model = out / paths.MODEL
    made = (model / folder.MARK).is_file()
    if source is not None:
        found = locating.model_of(source)
    else:
        found = model if made else samples.folder.parent / paths.TRANSFORMER / paths.MODEL
    if not (found / folder.MARK).is_file():
        if source is not None:
            raise ValueError(f"{found} is not a complete model folder (no {folder.MARK})")
        if made_samples(model, samples):  # an earlier call was refused after it had copied them
            return
        log.info("%s does not exist: this run can train, but not sample. Name the encoders' folder with --model", found)
        return
    differing = [name for name, digest in encoders.digests(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        model_folder.copy_encoders(found, model)
        if not made_samples(model, samples):
            raise ValueError(f"{model} contains files of other models, from a call that was refused; delete it")
    # Before the first checkpoint the config may still change. After that `loop.train` compares it first.
    if not files.steps(out / paths.CHECKPOINTS) and restarting.last_saved(out) is None:
        shift = config.timesteps.shift
        model_folder.finish(model, model_config_for(config, samples), shift, scheduler_source(config, source))
        if line := model_folder.describe_scheduler(model, shift):
            log.info("%s", line)


def update_model_folder(
    config: TransformerConfig, samples: Cache, model: pathlib.Path, base: pathlib.Path | None = None
) -> None:
    """Updates a run's model folder, if it has the encoders, to the config that the run trains with.

    Sampling and export read it. The config may have changed with `--accept-changes`, or the encoders may have come with
    a later `--model`.

    Args:
      config: config of the transformer stage.
      samples: samples that the run trains on.
      model: model folder of the run.
      base: run or model folder with the transformer that an adapter as `start.folder` changes.
    """
    if (model / folder.MARK).is_file() or made_samples(model, samples):
        shape = model_config_for(config, samples)
        model_folder.finish(model, shape, config.timesteps.shift, scheduler_source(config, base))


def scheduler_source(config: TransformerConfig, base: pathlib.Path | None) -> str:
    """The source of a run's scheduler: the start or, if that is an adapter, the model that it changes."""
    start = config.start.folder
    if start and reading.is_adapter(pathlib.Path(start)):
        return str(base) if base is not None else ""
    return start


def made_samples(model: pathlib.Path, samples: Cache) -> bool:
    """Whether a folder has the encoders that made the samples."""
    try:
        return all(samples.fingerprint.get(name) == digest for name, digest in encoders.digests(model).items())
    except OSError:  # files are missing
        return False


def check_source(source: str, base: pathlib.Path | None) -> None:
    """Checks that a start can be found, before anything is written.

    Args:
      source: `transformer.start.folder`.
      base: run or model folder with the transformer that an adapter changes; None: not given.

    Raises:
      ValueError: if the source is neither a model nor an adapter, or an adapter without a transformer.
    """
    locating.locate(starting_model(pathlib.Path(source), base))


def started_from(state: TrainState, source: pathlib.Path, mesh: Mesh, base: pathlib.Path | None = None) -> TrainState:
    """A state with the weights of a run, checkpoint or imported folder, or of a transformer with an adapter merged in.

    A run provides both its raw weights and its EMA.

    Args:
      state: fresh state of the whole transformer.
      source: run, checkpoint, imported folder or adapter.
      mesh: devices of all processes.
      base: run or model folder with the transformer that an adapter changes.

    Raises:
      ValueError: if the source is none of these, or its weights have other shapes; all of them are listed.
    """
    like = jax.eval_shape(lambda: state.model)
    located = locating.locate(starting_model(source, base))
    with processes.raise_together():
        if jax.process_index() == 0:
            located.check()
    changes = reading.read(source, like.config) if reading.is_adapter(source) else {}

    def load(item: str) -> MMDiT:
        weights = located.weights("transformer", item)
        check_fits(weights, like, source)
        merged = merging.merged(weights, changes) if changes else weights
        return stored_weights.load(merged, like, sharding.shardings(like, mesh), np.float32)

    return state._replace(model=load("model"), ema=load("ema"))


def starting_model(source: pathlib.Path, base: pathlib.Path | None) -> pathlib.Path:
    """The model with which a run begins: the source or, if that is an adapter, its base.

    Raises:
      ValueError: if the source is an adapter and there is no base.
    """
    if not reading.is_adapter(source):
        return source
    if base is None:
        raise ValueError(
            f"{source} is an adapter: name the run or model folder with the transformer that it changes with --model"
        )
    return base


def check_fits(weights: stored_weights.Weights, like: MMDiT, source: pathlib.Path) -> None:
    """Raises a ValueError that lists every weight of `source` whose shape is not that of `like`."""
    expected = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    stored_weights.check_ours({name: weight.shape for name, weight in weights.items()}, expected, str(source))
