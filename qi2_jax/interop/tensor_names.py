"""The bijection between published tensor names and ours.

Weights have the same orientation on both sides, so exchange only renames and stacks them: a published tensor with a
layer index becomes one slice of our stacked parameter. A few published tensors take no part in the computation, for
example convolutions over time in an image autoencoder. They pass through our files unchanged (passthrough tensors).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class NameMap:
    """The tensor names of a published component.

    Attributes:
      renames: (published, ours) prefixes, tried in order. `{}` in a published prefix stands for the layer index, which
        selects a slice of our stacked parameter. Names without a matching prefix are the same on both sides.
      passthrough: regular expressions of the names of passthrough tensors.
      passthrough_shapes: {published name: shape} of the passthrough tensors of this configuration.
      optional: names in `passthrough_shapes` that may be missing.
    """

    renames: tuple[tuple[str, str], ...] = ()
    passthrough: tuple[str, ...] = ()
    passthrough_shapes: Shapes = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()

    @functools.cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        return tuple(
            (re.compile(re.escape(published).replace(r"\{\}", r"(0|[1-9]\d*)")), ours)
            for published, ours in self.renames
        )

    def is_passthrough(self, published: str) -> bool:
        return any(re.fullmatch(pattern, published) for pattern in self.passthrough)

    def to_ours(self, published: str) -> tuple[str, int | None]:
        """Our name of a published tensor, and the index of its slice in a stacked parameter (None if not stacked)."""
        for pattern, ours in self._patterns:
            if match := pattern.match(published):
                return ours + published[match.end() :], int(match.group(1)) if match.groups() else None
        return published, None

    def is_stacked(self, published: str) -> bool:
        """Whether a published tensor is a slice of a stacked parameter."""
        return self.to_ours(published)[1] is not None

    def to_published(self, ours: str, shape: tuple[int, ...]) -> list[str]:
        """Published names of one of our parameters: one per slice if it is stacked, otherwise a single name.

        Raises:
          ValueError: for more than `MAX_LAYERS` slices, as a hostile configuration may claim.
        """
        for published, prefix in self.renames:
            if ours.startswith(prefix):
                rest = ours[len(prefix) :]
                if "{}" not in published:
                    return [published + rest]
                if shape[0] > MAX_LAYERS:
                    raise ValueError(f"the configuration asks for {shape[0]} layers; at most {MAX_LAYERS} are read")
                return [published.replace("{}", str(index)) + rest for index in range(shape[0])]
        return [ours]


def check(published: Shapes, expected: Shapes, names: NameMap, where: str, *, with_passthrough: bool = True) -> None:
    """Compares the tensors of a published component with the parameters of our model.

    Args:
      published: {published name: shape} as found in files.
      expected: {our name: shape}, stacked parameters with their leading dim.
      names: name map of the component.
      where: name of the component in the error.
      with_passthrough: whether to compare the passthrough tensors as well.

    Raises:
      ValueError: listing all missing, unexpected and misshapen tensors.
    """
    wanted = dict(names.passthrough_shapes) if with_passthrough else {}
    for ours, shape in expected.items():
        for target in names.to_published(ours, shape):
            wanted[target] = shape[1:] if names.is_stacked(target) else shape
    found = {name for name in published if with_passthrough or not names.is_passthrough(name)}
    problems = [f"missing: {name} {wanted[name]}" for name in sorted(wanted.keys() - found - set(names.optional))]
    problems += [f"unexpected: {name} {tuple(published[name])}" for name in sorted(found - wanted.keys())]
    problems += [
        f"misshapen: {name} is {tuple(published[name])}, the configuration says {tuple(wanted[name])}"
        for name in sorted(found & wanted.keys())
        if tuple(published[name]) != tuple(wanted[name])
    ]
    if problems:
        raise ValueError(
            f"{where}: {len(problems)} tensors do not match its configuration:\n  " + "\n  ".join(problems)
        )


def stack(published: Mapping[str, np.ndarray], expected: Mapping[str, Any], names: NameMap) -> dict[str, np.ndarray]:
    """Converts published tensors in memory to {our name: array}; for models small enough to be in memory twice.

    Args:
      published: {published name: array}, with or without the passthrough tensors.
      expected: {our name: anything with `.shape`}, for instance `tree.to_dict(abstract_model)`.

    Raises:
      ValueError: as `check`.
    """
    check(
        {name: tuple(array.shape) for name, array in published.items()},
        {name: tuple(leaf.shape) for name, leaf in expected.items()},
        names,
        "tensors",
        with_passthrough=False,
    )
    result = {}
    for ours, leaf in expected.items():
        arrays = [published[name] for name in names.to_published(ours, tuple(leaf.shape))]
        result[ours] = np.stack(arrays) if len(leaf.shape) > arrays[0].ndim else arrays[0]
    return result
