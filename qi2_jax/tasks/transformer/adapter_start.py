"""The start of a LoRA run: the transformer that it adapts, and the adapter that it continues."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.interop import stored_weights
from qi2_jax.interop.lora import merging, reading, writing
from qi2_jax.interop.lora.merging import Changes
from qi2_jax.interop.stored_weights import ArrayWeight
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.runs import locating, model_folder, paths
from qi2_jax.runtime import processes
from qi2_jax.runtime.digests import of_weights
from qi2_jax.tasks.transformer.start import check_fits, starting_model
from qi2_jax.training.checkpoints import files
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
      like: abstract transformer.
      source: run, checkpoint, imported folder or adapter with which the run begins; None: not given.
      run: folder of the run.
      config: adapter that the run trains.
      mesh: devices of all processes.
      dtype: dtype of the loaded transformer.
      base: run or model folder with the transformer that the adapter `source` changes.

    Raises:
      ValueError: if there is no transformer, its shapes are not those of the config, or the run began without an
        adapter.
    """
    place, digest = run / paths.MODEL / "transformer", ""
    with processes.raise_together():
        if jax.process_index() == 0:
            if not files.steps(run / paths.CHECKPOINTS):  # the source may still change
                if source is None:
                    raise ValueError("lora.rank is above 0: name the transformer to adapt with --start")
                if reading.is_adapter(source):  # now, not after minutes of copying
                    changes = reading.read(source, like.config)
                    _check_continues(source, changes, config, lora.targets(like, config))
                _keep_base(like, starting_model(source, base), run)
            elif (run / paths.CONFIG).is_file() and locating.lora_of(run) is None:
                raise ValueError(
                    f"{run} was created with a different config; rerun with the original values, or train an adapter "
                    f"of its model in another folder with --start {run}. What changed:\n  lora.rank: 0 -> {config.rank}"
                )
            digest = of_weights(sorted(place.glob("*.safetensors")))
    digest = processes.gather(digest)[0]
    shapes = {name: leaf.shape for name, leaf in tree.to_dict(like).items()}
    weights = stored_weights.open_ours(place, shapes)[0]
    return stored_weights.load(weights, like, sharding.shardings(like, mesh), dtype), f"sha256:{digest}"


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
    """A state whose model and EMA are the adapter of a file.

    The state may have a larger rank and more layers than the file. The additional rows of A keep their random values
    and the additional columns of B are zero, so the change is exactly that of the file. Where the scale of a layer
    differs from the config's, B is multiplied by the quotient.

    Args:
      state: state with a fresh adapter.
      source: file or folder of the adapter.
      config: adapter that the run trains.
      mesh: devices of all processes.
      base_config: configuration of the transformer.

    Raises:
      ValueError: if the file has a larger rank than the config or changes other layers; the message has values that
        fit.
    """
    changes, fresh = reading.read(source, base_config), state.model
    _check_continues(source, changes, config, list(fresh))
    values = {name: np.zeros(leaf.shape, np.float32) for name, leaf in tree.to_dict(fresh).items()}
    in_file = {name: np.zeros(leaf.shape, np.bool_) for name, leaf in values.items()}
    for path, layer, change in merging.each(changes):
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        index = () if layer is None else (layer,)
        quotient = change.scale / config.scale
        values[a][index][: change.rank] = change.a
        in_file[a][index][: change.rank] = True
        values[b][index][:, : change.rank] = change.b if quotient == 1 else np.float32(quotient) * change.b
        in_file[b][index][:, : change.rank] = True
    like = jax.eval_shape(lambda: fresh)
    shardings = sharding.shardings(like, mesh)

    def placed(arrays: dict[str, np.ndarray]) -> Any:
        return stored_weights.load({name: ArrayWeight(array) for name, array in arrays.items()}, like, shardings)

    def select(in_file: Any, values: Any, fresh: Any) -> Any:
        return jax.tree.map(jnp.where, in_file, values, fresh)

    model = jax.jit(select, out_shardings=shardings)(placed(in_file), placed(values), fresh)
    return state._replace(model=model, ema=jax.tree.map(jnp.copy, model))


def _check_continues(source: pathlib.Path, changes: Changes, config: LoRAConfig, adapted: list[str]) -> None:
    """Raises a ValueError with values that fit, if a config's adapter cannot contain that of a file."""
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
