"""Limits how far the host runs ahead of the devices.

Without a limit, the inputs of everything that is dispatched wait in device memory. On CPUs whose devices belong to
several processes the program can even deadlock: with 32 computations waiting on a device, the runtime blocks the
threads that the earlier ones need.
"""

import collections
from typing import Any

import jax


class InFlight:
    """Waits for earlier results before more work is dispatched.

    Args:
      most: number of computations that may be unfinished.
    """

    def __init__(self, most: int):
        self._most = most
        self._running: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """Counts a computation.

        Args:
          result: one of its outputs that is not donated later.
        """
        self._running.append(result)
        while len(self._running) > self._most:
            jax.block_until_ready(self._running.popleft())
