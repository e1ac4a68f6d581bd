"""Decides, together with all processes, after which step a training run stops."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qi2_jax.runtime import signals
from qi2_jax.training.reader import NEVER, Reader


class LastStep:
    """Agreement on the last step: every process proposes one, and the smallest counts.

    A proposal made after one step is known to all processes `lag` steps later, when that step is computed. A process
    that wants to stop must therefore take `lag` more steps. A single process needs no lag.

    Args:
      mesh: devices of all processes.
      lag: number of steps. With 0, every call blocks on the devices; this is free if the host blocks on every update
        anyway.
    """

    def __init__(self, mesh: Mesh, lag: int):
        self._lag, self._agreed, self._proposals = lag, NEVER, collections.deque[jax.Array | int]()
        self._several = jax.process_count() > 1
        if self._several:
            self._shape = (mesh.size,)
            self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            replicated = NamedSharding(mesh, PartitionSpec())
            self._never = self._put(NEVER)
            self._min = jax.jit(jnp.min, out_shardings=replicated).lower(self._never).compile()

    def _put(self, step: int) -> jax.Array:
        return jax.make_array_from_callback(self._shape, self._split, lambda _: np.full(1, step, np.int32))

    def propose(self, step: int, *, wait: bool = False) -> int:
        """Proposes this process's last step and returns the one that is agreed so far.

        Args:
          step: last step this process can take, at least `lag` steps in the future, except in the first call. `NEVER`
            for no limit.
          wait: whether to include the proposals of this call; the same in every process.
        """
        if self._several:
            self._proposals.append(self._min(self._never if step == NEVER else self._put(step)))
        else:
            self._proposals.append(step)
        while len(self._proposals) > (0 if wait else self._lag):
            self._agreed = min(self._agreed, int(jax.device_get(self._proposals.popleft())))
        return self._agreed


class Stopping:
    """Decides after each step whether another one follows; all processes get the same answer.

    A run stops early if a process received a signal or cannot read its data.

    Args:
      mesh: devices of all processes.
      reader: source of the updates, whose end limits the steps.
      start: step from which the run continues.
      total: last step of the run.
      ahead: updates that the host dispatches ahead of the devices.
    """

    def __init__(self, mesh: Mesh, reader: Reader, start: int, total: int, ahead: int):
        self.lag = ahead if jax.process_count() > 1 else 0
        self._reader, self._start, self._total = reader, start, total
        self._last_step, self._end = LastStep(mesh, self.lag), NEVER

    def should_continue(self, step: int) -> bool:
        """Whether a step follows `step`. Every process must call it once before the first step and after each."""
        first = step == self._start
        possible = self._reader.read_to(step + 1 + self.lag)
        if signals.received():
            possible = min(step if first else step + self.lag, possible)
        self._end = self._last_step.propose(possible, wait=first)
        return step < min(self._total, self._end)

    def is_early(self, step: int) -> bool:
        """Whether the run stops at `step` because of a signal or its data."""
        return self._end <= step
