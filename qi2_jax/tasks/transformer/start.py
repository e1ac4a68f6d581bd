"""What a run starts from: encoders, weights, and the transformer that an adapter changes."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipeline.samples.cache import Cache
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import Shift
from qi2_jax.inference import encoders
from qi2_jax.interop import folder
from qi2_jax.interop import weights as storage
from qi2_jax.models import tree
from qi2_jax.models.mmdit import MMDiT
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.runtime.digests import of_file
from qi2_jax.tasks.transformer.config import transformer_config
from qi2_jax.training.checkpoints import manager
from qi2_jax.training.step import TrainState


def give_model(config: Any, samples: Cache, source: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts the encoders that made the samples into a run, so that it can sample and be exported.

    Args:
      config: of the transformer stage.
      samples: what the run trains on.
      source: a model folder, or a run or job with one; None: that of the job which the samples belong to, or none.
      out: the run.

    Raises:
      ValueError: if the source is no model folder, or its encoders did not make these samples.
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
        print(f"{found} does not exist: this run can train, but not sample; name the encoders' folder with --model")
        return
    differing = [name for name, digest in encoders.digests(found).items() if samples.fingerprint.get(name) != digest]
    if differing:
        raise ValueError(f"{differing} of {found} did not make the samples in {samples.folder}; see --model")
    if not made:
        model_folder.adopt(found, model)
        if not made_samples(model, samples):
            raise ValueError(f"{model} holds files of other models, from a call that was refused; delete it")
    # The config may still change where nothing is trained yet; else it is compared first, see `train_transformer`.
    if not manager.steps(out / paths.CHECKPOINTS):
        model_folder.finish(model, transformer_config(config, samples), Shift(**config.timesteps.shift))


def made_samples(model: pathlib.Path, samples: Cache) -> bool:
    """Whether a folder has the encoders that made the samples."""
    try:
        return all(samples.fingerprint.get(name) == digest for name, digest in encoders.digests(model).items())
    except OSError:  # of files that are not there
        return False


def started_from(state: TrainState, source: pathlib.Path, mesh: Mesh) -> TrainState:
    """A state with the weights of a run, checkpoint or imported folder; of a run raw and averaged ones, each in their
    place.

    Raises:
      ValueError: if the source is none of these, or its weights have other shapes (all are named).
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
    """The transformer that an adapter changes, and its digest; from the run's beginning on it stands in the run's model
    folder.

    Raises:
      ValueError: if there is none, it has other shapes than the config's, or the run was begun without an adapter.
    """
    place, digest = run / paths.MODEL / "transformer", ""
    with processes.agreed():
        if jax.process_index() == 0:
            if not manager.steps(run / paths.CHECKPOINTS):  # it may still change
                if source is None:
                    raise ValueError("lora.rank is above 0: name the transformer to adapt with --start")
                located = locating.locate(source)
                located.check()
                weights = located.weights("transformer")
                _check_fits(weights, like, source)
                model_folder.save_weights(place, weights)
            elif (run / paths.CONFIG).is_file() and locating.lora_of(run) is None:
                raise ValueError(
                    f"{run} was begun with other values; go on with those, or begin an adapter of its model in another "
                    f"folder with --start {run}. What changed:\n  lora.rank: 0 -> {rank}"
                )
            digest = _digest(sorted(place.glob("*.safetensors")))
    digest = processes.gather(digest)[0]
    shapes = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    weights = storage.of_ours(place, shapes)[0]
    return storage.load(weights, like, sharding.shardings(like, mesh), dtype), f"sha256:{digest}"


def _digest(paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 of one file, as `sha256sum` prints it; of several that of their digests."""
    found = [of_file(path).hex() for path in paths]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def _check_fits(weights: storage.Weights, like: MMDiT, source: pathlib.Path) -> None:
    expected = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    storage.check_ours({name: weight.shape for name, weight in weights.items()}, expected, str(source))
