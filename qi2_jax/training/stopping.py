"""After which step all processes of a training stop."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

NEVER = np.iinfo(np.int32).max


class LastStep:
    """The last step, on which all processes agree: each says how far it would go, and the least counts.

    What a process says after one step, all know `lag` steps later, when that step is computed: a process that wants to
    stop or cannot go on must still take `lag` steps. A single process knows at once.

    Args:
      mesh: devices of all processes.
      lag: in steps; with 0 the devices are waited for, which costs nothing where they are waited for anyway.
    """

    def __init__(self, mesh: Mesh, lag: int):
        self._lag, self._least, self._said = lag, NEVER, collections.deque[jax.Array | int]()
        self._several = jax.process_count() > 1
        if self._several:
            self._shape = (mesh.size,)
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._never = self._own(NEVER)
            self._min = jax.jit(jnp.min, out_shardings=everywhere).lower(self._never).compile()

    def _own(self, last: int) -> jax.Array:
        return jax.make_array_from_callback(self._shape, self._split, lambda _: np.full(1, last, np.int32))

    def known(self, last: int, *, wait: bool = False) -> int:
        """Says after a step how far this process would go, `NEVER` if for ever; returns what all know by now.

        Args:
          last: at least `lag` steps away, once steps are taken.
          wait: for what all say now; every process must do so.
        """
        if self._several:
            self._said.append(self._min(self._never if last == NEVER else self._own(last)))
        else:
            self._said.append(last)
        while len(self._said) > (0 if wait else self._lag):
            self._least = min(self._least, int(self._said.popleft()))
        return self._least
