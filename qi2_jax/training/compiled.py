"""Programs of a training, compiled before the first step; a batch of another shape later is an error, not a stall."""

import concurrent.futures
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.runtime import logs
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.training.step import Programs, TrainState

_log = logging.getLogger(__name__)

AHEAD = 1  # parts of an update that wait on the devices while the next is put there


class Part(NamedTuple):
    """One batch of an update, on the mesh.

    Attributes:
      static: decides the compiled program.
      batch: what the loss reads.
      first: place of its first image in the update.
      weight: its share of the update's images, 0..1.
    """

    static: Hashable
    batch: Any
    first: int = 0
    weight: float = 1.0


class Compiled:
    """The compiled programs.

    Args:
      programs: see `step.make_programs`.
      state, frozen: what they will be called with; not changed.
      examples: one part of every kind that updates will be made of.
      accumulate: whether an update may have several parts.
      mesh: where sums live.
    """

    def __init__(
        self, programs: Programs, state: TrainState, frozen: Any, examples: Sequence[Part], accumulate: bool, mesh: Mesh
    ):
        self._shapes = {part.static: _shapes(part.batch) for part in examples}
        self._apply = None
        if not accumulate:
            self._steps = _compile(
                (part.static, programs.step.lower(state, frozen, part.static, part.batch)) for part in examples
            )
            return
        static, batch, *_ = examples[0]
        like = jax.eval_shape(
            lambda state, frozen, batch: programs.gradient(state, frozen, static, batch, 0), state, frozen, batch
        )
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)  # noqa: E731
        self._zeros = jax.jit(zeros, out_shardings=sharding.shardings(like, mesh)).lower().compile()
        sums = self._zeros()
        place = np.int32(0), np.float32(1)
        self._steps = _compile(
            (part.static, programs.add.lower(state, sums, frozen, part.static, part.batch, *place)) for part in examples
        )
        self._apply = programs.apply.lower(state, sums).compile()

    def __call__(
        self, state: TrainState, frozen: Any, parts: Iterable[Part], before_each: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, Any]]:
        """One update; the old state's memory is reused.

        Args:
          before_each: called before each of several parts; if it raises, the old state is still whole.

        Raises:
          ValueError: for a part of a shape for which nothing is compiled, naming it.
        """
        if self._apply is None:
            (part,) = parts
            return self._program(part)(state, frozen, part.batch)
        sums, running = self._zeros(), InFlight(AHEAD)
        for part in parts:
            before_each()
            program = self._program(part)
            sums, done = program(state, sums, frozen, part.batch, np.int32(part.first), np.float32(part.weight))
            running.add(done)
        return self._apply(state, sums)

    def _program(self, part: Part) -> jax.stages.Compiled:
        if self._shapes.get(part.static) != (shapes := _shapes(part.batch)):
            known = "\n  ".join(f"{static}: {shape}" for static, shape in self._shapes.items())
            raise ValueError(
                f"a batch of {part.static} with arrays {shapes} would need another program; compiled before the first "
                f"step were\n  {known}"
            )
        return self._steps[part.static]


def _compile(lowered: Iterable[tuple[Hashable, jax.stages.Lowered]]) -> dict[Hashable, jax.stages.Compiled]:
    """Compiles beside each other, and while the next is still traced: each takes minutes, and few of a host's cores."""
    with (
        logs.timed(_log, "compiling the programs of the training steps"),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "compile") as threads,
    ):
        compiling = {static: threads.submit(program.compile) for static, program in lowered}
        return {static: program.result() for static, program in compiling.items()}


def _shapes(batch: Any) -> tuple[str, ...]:
    return tuple(f"{leaf.dtype.name}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch))
