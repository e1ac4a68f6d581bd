"""Checkpoints of a run: atomic, asynchronous, in plain named leaves. The only file that knows Orbax.

`DIR/<step>/` holds four items: `model`, `ema`, `optimizer` (each a flat dict of named leaves) and `progress`.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qi2_jax import tree
from qi2_jax.interop.tensors import CODES
from qi2_jax.training.step import TrainState

ITEMS = ("model", "ema", "optimizer", "progress")


def _in_one_line(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failed save from every thread that it passes, and raises it in ours after that."""
    if "/orbax/" not in record.pathname or not record.exc_info:
        return True
    record.exc_info = None
    return "_SignalingThread.run() raised" not in record.getMessage()


logging.getLogger("absl").addFilter(_in_one_line)


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    return {
        "model": tree.to_dict(state.model),
        "ema": tree.to_dict(state.ema),
        "optimizer": tree.to_dict(state.optimizer),
        "progress": {"step": state.step, "skipped": state.skipped},
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where steps are kept; made if missing.
      keep: how many of the latest to keep.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, state: TrainState) -> None:
        """Copies the state off the devices and writes it in the background; an earlier save is awaited first."""
        step = int(state.step)
        if step != self.latest():
            self._checkpointer.save_checkpointables_async(step, _items(state), force=True)

    def restore(self, like: TrainState, step: int) -> TrainState:
        """Loads a step into the shapes, dtypes and shardings of an abstract state.

        Raises:
          ValueError: naming every leaf that the checkpoint lacks, has besides, or holds in another shape or dtype.
        """
        wanted = _items(like)
        check(self.directory / str(step), wanted)
        loaded = self._checkpointer.load_checkpointables(step, wanted)
        return TrainState(
            loaded["progress"]["step"],
            tree.from_dict(like.model, loaded["model"]),
            tree.from_dict(like.optimizer, loaded["optimizer"]),
            tree.from_dict(like.ema, loaded["ema"]),
            loaded["progress"]["skipped"],
        )

    def close(self) -> None:
        """Waits for saves under way."""
        self._checkpointer.close()


def steps(directory: pathlib.Path) -> list[int]:
    """Complete steps in a checkpoint directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.is_dir() and path.name.isdigit())


def describe(path: pathlib.Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves of one item of a step, without reading them."""
    found = ocp.checkpointables_metadata(path.resolve()).metadata
    if item not in found:
        raise ValueError(f"checkpoint {path} has no item {item!r}, only {sorted(found)}")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in found[item].items()}


def check(path: pathlib.Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Raises a ValueError that names every leaf of a step that does not match what is wanted."""
    problems = []
    for item, leaves in wanted.items():
        found = describe(path, item)
        problems += [f"{item}: {name} is missing" for name in sorted(leaves.keys() - found.keys())]
        problems += [f"{item}: {name} is unexpected" for name in sorted(found.keys() - leaves.keys())]
        for name in sorted(leaves.keys() & found.keys()):
            have, want = found[name], leaves[name]
            if tuple(have.shape) != tuple(want.shape) or have.dtype != want.dtype:
                problems.append(f"{item}: {name} is {have.dtype}{have.shape}, not {want.dtype}{want.shape}")
    if problems:
        raise ValueError(f"checkpoint {path} cannot be restored into this model:\n  " + "\n  ".join(problems))


_last_leaf: dict[tuple[pathlib.Path, str, str], np.ndarray] = {}


def _leaf(path: pathlib.Path, item: str, name: str) -> np.ndarray:
    """One leaf of a step. The last one is kept, since it is read in slices; only one is ever in memory."""
    key = (path.resolve(), item, name)
    if key not in _last_leaf:
        _last_leaf.clear()
        found = describe(path, item)
        leaves: dict[str, Any] = dict.fromkeys(found, ocp.PLACEHOLDER)
        leaves[name] = np.empty(found[name].shape, found[name].dtype)
        _last_leaf[key] = ocp.load_checkpointables(path.resolve(), {item: leaves})[item][name]
    return _last_leaf[key]


@dataclasses.dataclass(frozen=True)
class CheckpointWeight:
    """One parameter of a checkpoint, read leaf by leaf; a `qi2_jax.interop.weights.Weight`."""

    path: pathlib.Path
    item: str
    name: str
    shape: tuple[int, ...]
    code: str

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        return np.array(_leaf(self.path, self.item, self.name)[index], dtype=dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return _leaf(self.path, self.item, self.name)[... if layer is None else layer]


def weights(path: pathlib.Path, item: str) -> dict[str, CheckpointWeight]:
    """The parameters in item "ema" or "model" of a step.

    Raises:
      ValueError: if the step has no such item.
    """
    return {
        name: CheckpointWeight(path, item, name, tuple(leaf.shape), CODES[np.dtype(leaf.dtype)])
        for name, leaf in describe(path, item).items()
    }
