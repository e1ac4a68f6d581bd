"""How far the host may run ahead of the devices.

Without a bound, inputs of everything that is dispatched wait in the devices' memory. On CPUs whose devices belong to
several processes it may even never end: where 32 computations wait on a device, the runtime blocks the threads that the
ones before them need.
"""

import collections
from typing import Any

import jax


class InFlight:
    """Waits for earlier results before more is dispatched.

    Args:
      most: computations that the devices may still have to do.
    """

    def __init__(self, most: int):
        self._most = most
        self._running: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """Counts a computation by something that it returns and that nothing donates."""
        self._running.append(result)
        while len(self._running) > self._most:
            jax.block_until_ready(self._running.popleft())
