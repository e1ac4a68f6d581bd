"""Reads parts of a checkpoint without restoring it, and checks whether they fit a model."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from qi2_jax.runtime.dtypes import CODES


def contents(path: pathlib.Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of the leaves of all items of a step, without reading them."""
    return {
        item: {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        for item, leaves in ocp.checkpointables_metadata(path.resolve()).metadata.items()
    }


def describe(path: pathlib.Path, item: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves of one item of a step, without reading them."""
    found = contents(path)
    if item not in found:
        raise ValueError(f"checkpoint {path} has no item {item!r}, only {sorted(found)}")
    return found[item]


def check(path: pathlib.Path, wanted: dict[str, dict[str, Any]]) -> None:
    """Raises a ValueError that names every leaf of a step that does not match the wanted shapes and dtypes."""
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


def _leaf(path: pathlib.Path, item: str, name: str) -> tensorstore.TensorStore:
    """One leaf of a step, to be read in slices.

    Orbax would load whole items and, with several processes, only if all of them call it.
    """
    base = {"driver": "file", "path": f"{path.resolve() / item}/"}  # a URL would need quoting
    place = {"driver": "ocdbt", "base": base, "path": name}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, open=True, read=True).result()


@dataclasses.dataclass(frozen=True)
class CheckpointWeight:
    """One parameter of a checkpoint, which is read on demand; a `qi2_jax.interop.stored_weights.Weight`."""

    path: pathlib.Path
    item: str
    name: str
    shape: tuple[int, ...]
    code: str

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        return np.array(_leaf(self.path, self.item, self.name)[index].read().result(), dtype=dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return np.array(_leaf(self.path, self.item, self.name)[... if layer is None else layer].read().result())


def weights(path: pathlib.Path, item: str) -> dict[str, CheckpointWeight]:
    """The parameters in the item "ema" or "model" of a step.

    Raises:
      ValueError: if the step has no such item.
    """
    return {
        name: CheckpointWeight(path, item, name, tuple(leaf.shape), CODES[np.dtype(leaf.dtype)])
        for name, leaf in describe(path, item).items()
    }
