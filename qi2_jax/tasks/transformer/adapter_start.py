"""What a LoRA run starts from: the transformer that it adapts, and the adapter that it continues."""

import hashlib
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.interop import weights as storage
from qi2_jax.interop.lora import merging, reading, writing
from qi2_jax.interop.lora.merging import Changes
from qi2_jax.interop.weights import ArrayWeight
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.tasks.transformer.start import check_fits, model_with
from qi2_jax.training.checkpoints import manager
from qi2_jax.training.step import TrainState


def base_of_adapter(
    like: MMDiT,
    source: pathlib.Path | None,
    run: pathlib.Path,
    config: LoRAConfig,
    mesh: Mesh,
    dtype: Any,
    base: pathlib.Path | None = None,
) -> tuple[MMDiT, str]:
    """The transformer that an adapter changes, and its digest.

    From the run's beginning on, this transformer is in the run's model folder. If it comes from a LoRA run, it contains
    that run's adapter, which is kept beside it so that both adapters can be exported as one.

    Args:
      like: the abstract transformer.
      source: run, checkpoint, imported folder or adapter with which the run begins; None: not given.
      run: the run.
      config: the adapter that the run trains.
      mesh: devices of this and the other processes.
      dtype: dtype of the loaded transformer.
      base: run or model folder with the transformer that the adapter `source` changes.

    Raises:
      ValueError: if there is no transformer, its shapes are not those of the config, or the run began without an
        adapter.
    """
    place, digest = run / paths.MODEL / "transformer", ""
    with processes.agreed():
        if jax.process_index() == 0:
            if not manager.steps(run / paths.CHECKPOINTS):  # it may still change
                if source is None:
                    raise ValueError("lora.rank is above 0: name the transformer to adapt with --start")
                if reading.is_adapter(source):  # now, not after minutes of copying
                    changes = reading.read(source, like.config)
                    _check_continues(source, changes, config, lora.targets(like, config))
                _keep_base(like, model_with(source, base), run)
            elif (run / paths.CONFIG).is_file() and locating.lora_of(run) is None:
                raise ValueError(
                    f"{run} was begun with other values; go on with those, or begin an adapter of its model in another "
                    f"folder with --start {run}. What changed:\n  lora.rank: 0 -> {config.rank}"
                )
            digest = _digest(sorted(place.glob("*.safetensors")))
    digest = processes.gather(digest)[0]
    shapes = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    weights = storage.of_ours(place, shapes)[0]
    return storage.load(weights, like, sharding.shardings(like, mesh), dtype), f"sha256:{digest}"


def _keep_base(like: MMDiT, source: pathlib.Path, run: pathlib.Path) -> None:
    """Writes the transformer to adapt into a run and, if it comes from a LoRA run, the adapter merged into it."""
    located, kept = locating.locate(source), run / paths.START_LORA
    located.check()
    weights = located.weights("transformer")
    check_fits(weights, like, source)
    shutil.rmtree(kept, ignore_errors=True)
    if located.lora is not None and not located.lacks_start_lora():
        writing.export_changes(located.changes(), kept)
    model_folder.save_weights(run / paths.MODEL / "transformer", weights)


def continued(
    state: TrainState, source: pathlib.Path, config: LoRAConfig, mesh: Mesh, base_config: MMDiTConfig
) -> TrainState:
    """A state that goes on with the adapter of a file: raw and averaged factors are those of the file.

    Where the state's rank is larger, its further rows of A stay random and columns of B zero, so that the change is the
    file's exactly; layers that only the state adapts begin as in a fresh adapter. A scale other than the config's moves
    into B.

    Args:
      state: a state with a fresh adapter.
      source: the adapter's file or folder.
      config: the adapter that is trained.
      mesh: devices of this and the other processes.
      base_config: configuration of the transformer.

    Raises:
      ValueError: if the file has a larger rank or other layers than the config, naming them and values that fit.
    """
    changes, fresh = reading.read(source, base_config), state.model
    _check_continues(source, changes, config, list(fresh))
    values = {name: np.zeros(leaf.shape, np.float32) for name, leaf in tree.to_dict(fresh).items()}
    given = {name: np.zeros(leaf.shape, np.bool_) for name, leaf in values.items()}
    for path, layer, change in merging.each(changes):
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        index = () if layer is None else (layer,)
        factor = change.scale / config.scale
        values[a][index][: change.rank] = change.a
        given[a][index][: change.rank] = True
        values[b][index][:, : change.rank] = change.b if factor == 1 else np.float32(factor) * change.b
        given[b][index][:, : change.rank] = True
    like = jax.eval_shape(lambda: fresh)
    places = sharding.shardings(like, mesh)

    def placed(arrays: dict[str, np.ndarray]) -> Any:
        return storage.load({name: ArrayWeight(array) for name, array in arrays.items()}, like, places)

    def combine(fresh: Any, values: Any, given: Any) -> Any:
        return jax.tree.map(lambda own, value, is_given: jnp.where(is_given, value, own), fresh, values, given)

    model = jax.jit(combine)(fresh, placed(values), placed(given))
    return state._replace(model=model, ema=jax.tree.map(jnp.copy, model))


def _check_continues(source: pathlib.Path, changes: Changes, config: LoRAConfig, adapted: list[str]) -> None:
    """Raises a ValueError, with values that fit, if an adapter from a file does not fit into that of a config."""
    rank = max(change.rank for _, _, change in merging.each(changes))
    missing = sorted(path for path in changes if path not in adapted)
    problems = [f"it has the rank {rank}, transformer.lora.rank is {config.rank}"] if rank > config.rank else []
    problems += [f"it changes {missing}, which transformer.lora.targets {config.targets} leave out"] if missing else []
    if problems:
        targets = (*config.targets, *missing)
        raise ValueError(
            f"{source} cannot be continued: {'; '.join(problems)}. Give transformer.lora.rank={max(rank, config.rank)} "
            f'"transformer.lora.targets={targets}", or train the whole transformer with transformer.lora.rank=0'
        )


def _digest(paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 of one file, as `sha256sum` prints it; of several that of their digests."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
