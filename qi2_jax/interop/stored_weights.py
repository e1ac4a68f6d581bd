"""Weights of a component under our names, wherever they are stored; slices are read directly onto a mesh."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from qi2_jax.interop import tensor_names, tensors
from qi2_jax.interop.tensors import Stored
from qi2_jax.models import tree
from qi2_jax.runtime.dtypes import CODES, DTYPES

PASSTHROUGH = "carried."  # prefix of passthrough tensors (published ones that our model does not use) in our files
STEM = "model"  # name of our weight files without suffix


@runtime_checkable
class Weight(Protocol):
    """A parameter, wherever it is stored: its safetensors dtype code, shape and values."""

    @property
    def code(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        """The slice that `index` selects (everything by default), converted to `dtype`."""
        ...

    def part(self, layer: int | None) -> Stored | np.ndarray:
        """One layer of a stacked parameter, or the whole parameter (None), for writing."""
        ...


Weights = Mapping[str, Weight]


@dataclasses.dataclass(frozen=True)
class FileWeight:
    """A parameter in safetensors files: one stored tensor, or one per layer, stacked along a new leading dim."""

    pieces: tuple[Stored, ...]
    stacked: bool

    @property
    def code(self) -> str:
        return self.pieces[0].code

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.pieces), *self.pieces[0].shape) if self.stacked else self.pieces[0].shape

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        """As `Weight.read`; only the selected part is read from the file."""
        if not self.stacked:
            part = self.pieces[0].open()[index]
        else:
            layers = range(len(self.pieces))[index[0] if index else slice(None)]
            part = np.stack([self.pieces[layer].open()[index[1:]] for layer in layers])
        return np.array(part, dtype=dtype)

    def part(self, layer: int | None) -> Stored:
        if not self.stacked:
            return self.pieces[0].part(layer)
        assert layer is not None
        return self.pieces[layer]


FileWeights = Mapping[str, FileWeight]


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayWeight:
    """A parameter in memory."""

    array: np.ndarray

    @property
    def code(self) -> str:
        return CODES[self.array.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        return np.array(self.array[index], dtype=dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return self.array if layer is None else self.array[layer]


@dataclasses.dataclass(frozen=True)
class CastWeight:
    """A parameter that is converted to another dtype when it is read."""

    weight: Weight
    code: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, index: tuple[slice, ...] = (), dtype: Any = None) -> np.ndarray:
        values = self.weight.read(index, DTYPES[self.code])
        return values if dtype is None else values.astype(dtype)

    def part(self, layer: int | None) -> np.ndarray:
        return self.read() if layer is None else self.read((slice(layer, layer + 1),))[0]


def open_published(
    folder: pathlib.Path,
    stem: str,
    expected: tensor_names.Shapes,
    names: tensor_names.NameMap,
    variant: str | None = None,
) -> tuple[dict[str, FileWeight], dict[str, FileWeight]]:
    """Weights of a published component, and its passthrough tensors.

    Args:
      folder, stem, variant: see `published_files.weights_file`.
      expected: {our name: shape} according to its configuration.
      names: name map of the component.

    Raises:
      ValueError: listing all missing, unexpected and misshapen tensors, or all parameters whose layers have different
        dtypes.
    """
    found = tensors.scan_folder(folder, stem, variant)
    tensor_names.check({name: stored.shape for name, stored in found.items()}, expected, names, str(folder))
    weights, mixed = {}, []
    for ours, shape in expected.items():
        published = names.to_published(ours, shape)
        pieces = tuple(found[name] for name in published)
        if len(codes := {piece.code for piece in pieces}) > 1:
            mixed.append(f"{ours} {sorted(codes)}")
        weights[ours] = FileWeight(pieces, stacked=names.is_stacked(published[0]))
    if mixed:
        raise ValueError(f"{folder}: the layers of these parameters have different dtypes: {mixed}")
    return weights, _whole({name: stored for name, stored in found.items() if names.is_passthrough(name)})


def open_ours(
    folder: pathlib.Path, expected: tensor_names.Shapes
) -> tuple[dict[str, FileWeight], dict[str, FileWeight]]:
    """Weights of a component in a model folder, and its passthrough tensors; raises as `open_published`."""
    found = tensors.scan_folder(folder, STEM)
    ours = {name: stored for name, stored in found.items() if not name.startswith(PASSTHROUGH)}
    check_ours({name: stored.shape for name, stored in ours.items()}, expected, str(folder))
    return _whole(ours), _passthrough(found)


def open_passthrough(folder: pathlib.Path) -> dict[str, FileWeight]:
    """Passthrough tensors of a component in a model folder; none if its weights are stored elsewhere."""
    return _passthrough(tensors.scan_folder(folder, STEM)) if (folder / f"{STEM}.safetensors").is_file() else {}


def _passthrough(found: Mapping[str, Stored]) -> dict[str, FileWeight]:
    return _whole(
        {name.removeprefix(PASSTHROUGH): stored for name, stored in found.items() if name.startswith(PASSTHROUGH)}
    )


def _whole(found: Mapping[str, Stored]) -> dict[str, FileWeight]:
    return {name: FileWeight((stored,), stacked=False) for name, stored in found.items()}


def cast(weights: Weights, code: str) -> Weights:
    """The weights in another dtype, given by its safetensors code; they are converted when they are read."""
    return {name: weight if weight.code == code else CastWeight(weight, code) for name, weight in weights.items()}


def check_ours(found: tensor_names.Shapes, expected: tensor_names.Shapes, where: str) -> None:
    """Raises a ValueError that lists all parameters that do not match the configuration."""
    tensor_names.check(found, expected, tensor_names.NameMap(), where)


def load(weights: Weights, like: Any, shardings: Any = None, dtype: Any = None) -> Any:
    """Builds a model from weights, leaf by leaf; each device reads only its slices.

    Args:
      weights: weights for all leaves of `like`.
      like: abstract model.
      shardings: a tree prefix of shardings for `like` (`qi2_jax.sharding.shardings`); None: the default device.
      dtype: dtype to convert to; None: as stored.
    """
    placed = [None] * len(jax.tree.leaves(like))
    if shardings is not None:
        placed = jax.tree.leaves(jax.tree.map(lambda s, part: jax.tree.map(lambda _: s, part), shardings, like))

    def array(weight: Weight, sharding: jax.sharding.Sharding | None) -> jax.Array:
        if sharding is None:
            return jax.numpy.asarray(weight.read(dtype=dtype))
        return jax.make_array_from_callback(weight.shape, sharding, lambda index: weight.read(index or (), dtype))

    order = list(tree.to_dict(like))
    return tree.from_dict(like, {name: array(weights[name], place) for name, place in zip(order, placed, strict=True)})
