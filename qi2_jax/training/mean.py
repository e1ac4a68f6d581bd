"""A mean that is kept as a sum and a count, so that means over parts combine exactly."""

from typing import Any, NamedTuple


class Mean(NamedTuple):
    """A mean over images, slots or the like. As a pytree it can be added up and scaled, also inside a compiled program.

    Attributes:
      total: sum of the values.
      count: number of values, or any other weight that `total` was built with. With a count of 0 there is no mean.
    """

    total: Any
    count: Any
