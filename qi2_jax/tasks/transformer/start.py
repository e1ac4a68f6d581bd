"""What a run starts from: encoders, weights, and the transformer that an adapter changes."""

import hashlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipeline.samples.cache import Cache
from qi2_jax import sharding
from qi2_jax.inference import encoders
from qi2_jax.interop import folder
from qi2_jax.interop import weights as storage
from qi2_jax.models import tree
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.tasks.transformer.config import TransformerConfig, transformer_config
from qi2_jax.training import restarting
from qi2_jax.training.checkpoints import manager
from qi2_jax.training.step import TrainState

log = logging.getLogger(__name__)


def give_model(config: TransformerConfig, samples: Cache, source: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: config of the transformer stage.
      samples: samples that the run trains on.
      source: a model folder, or a run or job with one; None for that of the job which the samples belong to, if any.
      out: the run.

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
        if made_samples(model, samples):  # an earlier call was refused after it had put them there
            return
        print(f"{found} does not exist: this run can train, but not sample. Name the encoders' folder with --model")
        return
    differing = [name for name, digest in encoders.digests(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        model_folder.adopt(found, model)
        if not made_samples(model, samples):
            raise ValueError(f"{model} contains files of other models, from a call that was refused; delete it")
    # Before the first checkpoint the config may still change. After that `loop.train` compares it first.
    if not manager.steps(out / paths.CHECKPOINTS) and restarting.last_saved(out) is None:
        shift = config.timesteps.shift
        model_folder.finish(model, transformer_config(config, samples), shift, config.start.folder)
        if line := model_folder.describe_scheduler(model, shift):
            log.info("%s", line)


def finish_model(config: TransformerConfig, samples: Cache, model: pathlib.Path) -> None:
    """Brings a run's model folder, if it has the encoders, to the config that the run is trained with.

    Sampling and export read it. The config may have changed with `--accept-changes`, or the encoders may have come with
    a later `--model`.

    Args:
      config: config of the transformer stage.
      samples: samples that the run trains on.
      model: model folder of the run.
    """
    if (model / folder.MARK).is_file() or made_samples(model, samples):
        shape = transformer_config(config, samples)
        model_folder.finish(model, shape, config.timesteps.shift, config.start.folder)


def made_samples(model: pathlib.Path, samples: Cache) -> bool:
    """Whether a folder has the encoders that made the samples."""
    try:
        return all(samples.fingerprint.get(name) == digest for name, digest in encoders.digests(model).items())
    except OSError:  # files are missing
        return False


def started_from(state: TrainState, source: pathlib.Path, mesh: Mesh) -> TrainState:
    """A state with the weights of a run, checkpoint or imported folder. A run gives its raw weights and its EMA.

    Raises:
      ValueError: if the source is none of these, or its weights have other shapes, naming all of them.
    """
    like, located = jax.eval_shape(lambda: state.model), locating.locate(source)
    with processes.agreed():
        if jax.process_index() == 0:
            located.check()

    def load(item: str) -> MMDiT:
        weights = located.weights("transformer", item)
        _check_fits(weights, like, source)
        return storage.load(weights, like, sharding.shardings(like, mesh), np.float32)

    return state._replace(model=load("model"), ema=load("ema"))


def base_of_adapter(
    like: MMDiT, source: pathlib.Path | None, run: pathlib.Path, rank: int, mesh: Mesh, dtype: Any
) -> tuple[MMDiT, str]:
    """The transformer that an adapter changes, and its digest. It is copied into the run's model folder at the start.

    Args:
      like: shapes of the transformer.
      source: run, checkpoint or imported folder to copy it from.
      run: the run of the adapter.
      rank: rank of the adapter.
      mesh: devices of the run.
      dtype: dtype of the weights on the mesh.

    Raises:
      ValueError: if there is no source, its weights have other shapes, or the run was started without an adapter.
    """
    place, digest = run / paths.MODEL / "transformer", ""
    with processes.agreed():
        if jax.process_index() == 0:
            if not manager.steps(run / paths.CHECKPOINTS):  # the source may still change
                if source is None:
                    raise ValueError("lora.rank is above 0: name the transformer to adapt with --start")
                located = locating.locate(source)
                located.check()
                weights = located.weights("transformer")
                _check_fits(weights, like, source)
                model_folder.save_weights(place, weights)
            elif (run / paths.CONFIG).is_file() and locating.lora_of(run) is None:
                raise ValueError(
                    f"{run} was created with a different config; rerun with the original values, or train an adapter "
                    f"of its model in another folder with --start {run}. What changed:\n  lora.rank: 0 -> {rank}"
                )
            digest = _digest(sorted(place.glob("*.safetensors")))
    digest = processes.gather(digest)[0]
    shapes = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    weights = storage.of_ours(place, shapes)[0]
    return storage.load(weights, like, sharding.shardings(like, mesh), dtype), f"sha256:{digest}"


def _digest(paths: Sequence[pathlib.Path]) -> str:
    """The SHA-256 of one file, as `sha256sum` prints it; of several files, the hash of their digests."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_fits(weights: storage.Weights, like: MMDiT, source: pathlib.Path) -> None:
    expected = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    storage.check_ours({name: weight.shape for name, weight in weights.items()}, expected, str(source))
