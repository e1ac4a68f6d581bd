"""Training programs, all compiled before the first step: a batch of another shape is an error, not a stall."""

import concurrent.futures
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.runtime import compiler, logs
from qi2_jax.runtime.in_flight import InFlight
from qi2_jax.training.microbatch import Microbatch, put_scalar
from qi2_jax.training.step import Programs, TrainState, leading_dims

_log = logging.getLogger(__name__)

AHEAD = 1  # microbatches that wait on the devices while the next one is copied there


class Compiled:
    """The compiled programs of a training run.

    Args:
      programs: functions to compile, see `step.make_programs`.
      state: training state, in the shapes and shardings of later calls; it is not changed.
      frozen: arrays that the loss reads and training does not change.
      examples: one microbatch on the mesh for each layout.
      accumulate: whether an update may have several microbatches.
      mesh: devices of the run.
      replicas: see `step.make_programs`.
    """

    def __init__(
        self,
        programs: Programs,
        state: TrainState,
        frozen: Any,
        examples: Sequence[Microbatch],
        accumulate: bool,
        mesh: Mesh,
        replicas: int = 1,
    ):
        self._shapes = {example.layout: _shapes(example.batch) for example in examples}
        self._apply, self._mesh = None, mesh
        options = compiler.options_for(mesh.devices.flat)
        if not accumulate:
            steps = (
                (example.layout, programs.step.lower(state, frozen, example.layout, example.batch))
                for example in examples
            )
            self._steps = _compile(steps, options)
            return
        layout, batch, *_ = examples[0]
        like = jax.eval_shape(
            lambda state, frozen, batch: programs.gradient(state, frozen, layout, batch, 0), state, frozen, batch
        )
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)  # noqa: E731
        placed = sharding.shardings(like, mesh, leading_dims(replicas))
        self._zeros = jax.jit(zeros, out_shardings=placed).lower().compile()
        sums = self._zeros()
        place = self._place(examples[0])
        steps = (
            (example.layout, programs.add.lower(state, sums, frozen, example.layout, example.batch, *place))
            for example in examples
        )
        self._steps = _compile(steps, options)
        self._apply = programs.apply.lower(state, sums).compile(options)

    def __call__(
        self,
        state: TrainState,
        frozen: Any,
        microbatches: Iterable[Microbatch],
        check_signals: Callable[[], None] = lambda: None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes one step and returns the new state and its metrics. The memory of the old state is reused.

        Args:
          state: training state.
          frozen: as in the constructor.
          microbatches: microbatches of the update, on the mesh.
          check_signals: callback before each microbatch of a gradient accumulation. If it raises, `state` is intact.

        Raises:
          ValueError: if no program is compiled for the shape of a microbatch.
        """
        if self._apply is None:
            (microbatch,) = microbatches
            return self._program(microbatch)(state, frozen, microbatch.batch)
        sums, in_flight = self._zeros(), InFlight(AHEAD)
        for microbatch in microbatches:
            check_signals()
            program = self._program(microbatch)
            sums, loss = program(state, sums, frozen, microbatch.batch, *self._place(microbatch))
            in_flight.add(loss)
        return self._apply(state, sums)

    def _place(self, microbatch: Microbatch) -> tuple[jax.Array, jax.Array]:
        """Index of the first image and weight within the update, on every device."""
        first, weight = np.int32(microbatch.first), np.float32(microbatch.weight)
        return put_scalar(self._mesh, first), put_scalar(self._mesh, weight)

    def _program(self, microbatch: Microbatch) -> jax.stages.Compiled:
        if self._shapes.get(microbatch.layout) != (shapes := _shapes(microbatch.batch)):
            known = "\n  ".join(f"{layout}: {shape}" for layout, shape in self._shapes.items())
            raise ValueError(
                f"no program was compiled for a batch of {microbatch.layout} with arrays {shapes}. Compiled before the "
                f"first step:\n  {known}"
            )
        return self._steps[microbatch.layout]


def _compile(
    lowered: Iterable[tuple[Hashable, jax.stages.Lowered]], options: dict[str, str | bool]
) -> dict[Hashable, jax.stages.Compiled]:
    """Compiles in parallel, while the next program is traced: each takes minutes, but few of a host's cores."""
    with (
        logs.timed(_log, "compiling the programs of the training steps"),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "compile") as threads,
    ):
        compiling = {layout: threads.submit(program.compile, options) for layout, program in lowered}
        return {layout: program.result() for layout, program in compiling.items()}


def _shapes(batch: Any) -> tuple[str, ...]:
    return tuple(f"{leaf.dtype.name}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch))
