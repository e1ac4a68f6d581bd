"""Low-rank changes, added to the weights of a transformer as they are read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qi2_jax.interop import stored_weights
from qi2_jax.interop.stored_weights import Weight, Weights
from qi2_jax.models.lora import LoRAConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The change `scale * B A` of one matrix, in fp32.

    Attributes:
      a: A, [rank, in].
      b: B, [out, rank].
      scale: factor of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


# {our path of a linear layer: {index in its stack, None if it is not stacked: its change}}
Changes = Mapping[str, Mapping[int | None, Change]]


def changes_of(adapter: Mapping[str, np.ndarray], config: LoRAConfig) -> dict[str, dict[int | None, Change]]:
    """The changes of an adapter that a run trained.

    Args:
      adapter: leaves as {our name: array}.
      config: configuration of the adapter, with its scale.
    """
    arrays = {name: np.asarray(array, np.float32) for name, array in adapter.items()}
    result: dict[str, dict[int | None, Change]] = {}
    for path in sorted({name.rpartition(".lora_")[0] for name in arrays}):
        a, b = (arrays[f"{path}.lora_{factor}.weight"] for factor in "AB")
        if a.ndim == 2:
            result[path] = {None: Change(a, b, config.scale)}
        else:
            result[path] = {layer: Change(a[layer], b[layer], config.scale) for layer in range(len(a))}
    return result


def scaled(changes: Changes, factor: float) -> Changes:
    """The same changes, each multiplied by a factor."""
    return {
        path: {layer: dataclasses.replace(change, scale=factor * change.scale) for layer, change in layers.items()}
        for path, layers in changes.items()
    }


def concatenated(adapters: Sequence[Changes]) -> dict[str, dict[int | None, Change]]:
    """One adapter whose changes are the sums of several adapters' changes.

    The factors of a layer are stacked along the rank: `[B1 B2] [A1; A2] = B1 A1 + B2 A2`. Ranks add up, and the scales,
    which may differ, move into B.
    """
    found: dict[str, dict[int | None, list[Change]]] = {}
    for changes in adapters:
        for path, layer, change in each(changes):
            found.setdefault(path, {}).setdefault(layer, []).append(change)

    def joined(parts: list[Change]) -> Change:
        b = [part.b if part.scale == 1 else np.float32(part.scale) * part.b for part in parts]
        return Change(np.concatenate([part.a for part in parts]), np.concatenate(b, axis=1), 1.0)

    return {path: {layer: joined(parts) for layer, parts in layers.items()} for path, layers in found.items()}


def each(changes: Changes) -> Iterator[tuple[str, int | None, Change]]:
    """(Path, index in its stack, change) of every changed matrix."""
    for path, layers in changes.items():
        for layer, change in layers.items():
            yield path, layer, change


@dataclasses.dataclass(frozen=True, eq=False)
class MergedWeight:
    """A parameter plus its low-rank changes in fp32, computed for the slice that is read; a `Weight`.

    Attributes:
      weight: parameter without its changes.
      changes: {index in its stack, None if it is not stacked: its change}.
    """

    weight: Weight
    changes: Mapping[int | None, Change]
    code: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        """The slice that `index` selects. One layer's change is formed at a time: all of them would fill the memory."""
        *stack, rows, columns = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        values = self.weight.read(index, np.float32)
        layers = range(self.shape[0])[stack[0]] if stack else [None]
        for layer, target in zip(layers, values if stack else [values], strict=True):
            if change := self.changes.get(layer):
                target += np.float32(change.scale) * (change.b[rows] @ change.a[:, columns])
        return values if dtype is None else values.astype(dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return self.read() if layer is None else self.read((slice(layer, layer + 1),))[0]


def merged(base: Weights, changes: Changes) -> dict[str, Weight]:
    """Weights of a full model in fp32, whatever dtype the base is stored in; each is computed as it is read.

    Args:
      base: every parameter of the transformer.
      changes: changes to add.
    """
    result: dict[str, Weight] = dict(stored_weights.cast(base, "F32"))
    for path, layers in changes.items():
        result[f"{path}.weight"] = MergedWeight(base[f"{path}.weight"], layers)
    return result
