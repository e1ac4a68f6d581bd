"""Ahead-of-time compilation of the transformer's training programs for a TPU topology, on a machine without TPUs.

It compiles the functions with which a run trains (`training.step`, `tasks.transformer.objective`), on shapes instead of
arrays. The compiler reports the memory that a chip needs, or fails as it would on the pod.
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipeline.loading.batch import Batch
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.runtime import compiler
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.config import ExecutionConfig, TransformerConfig
from qi2_jax.tasks.transformer.execution import divided_of, execution_on, training_execution
from qi2_jax.tasks.transformer.objective import Objective, make_loss
from qi2_jax.training.optimizer import Optimizer
from qi2_jax.training.step import (
    Programs,
    TrainState,
    abstract,
    abstract_state,
    leading_dims,
    make_optimizer,
    make_programs,
)

OPTIMIZER = Optimizer(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, clip=1.0, warmup=1000, decay_steps=0)
GIB = 2**30


def topology_mesh(name: str, shape: sharding.MeshShape, num_slices: int = 1) -> Mesh:
    """A mesh over the chips of a topology, which need not be attached.

    Args:
      name: generation and chips along each axis of a slice's torus, such as "v6e:16x16" or "v5p:2x2x4".
      shape: devices along each mesh axis, for the chips of all slices.
      num_slices: number of slices, connected by the data-center network.

    Raises:
      ValueError: if libtpu is not installed, the topology is unknown, or the shape does not fit its chips or slices.
    """
    return sharding.make_mesh(shape, topology_devices(name, num_slices))


def host_mesh(name: str, shape: sharding.MeshShape) -> Mesh:
    """A mesh over the chips of one host of a topology; arguments and errors as in `topology_mesh`."""
    generation, _, sides = name.partition(":")
    devices = topology_devices(name)
    coords = [device.coords for device in devices if device.process_index == devices[0].process_index]
    host = [len(set(values)) for values in zip(*coords, strict=True)][: 1 + sides.count("x")]
    return topology_mesh(f"{generation}:{'x'.join(map(str, host))}", shape)


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The chips of a topology; see `topology_mesh`.

    Raises:
      ValueError: if libtpu is not installed or the topology is unknown.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu, which is not installed: pip install 'qi2[tpu]'")
    # No TPU is needed: do not query the cloud's metadata server, and do not lock a TPU that another process uses.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these, libtpu looks for a TPU host and reports that there is none.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-16")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=num_slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {name!r} is unknown to libtpu; write it like 'v6e:16x16': {error}") from error
    return list(topology.devices)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one chip, in bytes.

    Attributes:
      arguments: size of the program's arguments.
      temporaries: size of all intermediate results.
      outputs: size of the program's outputs.
      aliased: part of the outputs that reuses the memory of arguments.
      code: size of the program.
      peak: estimate by the compiler of the largest memory in use at a time, without fragmentation.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    peak: int

    @property
    def total(self) -> int:
        """Memory that the chip must have."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The training programs of a transformer on a mesh, for compilation.

    Attributes:
      model: architecture of the transformer.
      execution: group `transformer.execution` of a config.
      mesh: see `topology_mesh`.
      optimizer: optimizer of the run.
    """

    model: MMDiTConfig
    execution: ExecutionConfig
    mesh: Mesh
    optimizer: Optimizer = OPTIMIZER

    @classmethod
    def of(cls, config: TransformerConfig, mesh: Mesh) -> Self:
        """The programs of a run with this config.

        Raises:
          ValueError: if it trains an adapter.
        """
        if config.adapter is not None:
            raise ValueError(f"a plan with transformer.lora.rank={config.lora.rank} is not possible, only one with 0")
        return cls(config.model, config.execution, mesh, config.optimizer)

    def execution_of(self, layout: Layout, images: int) -> Execution:
        """How a program runs, see `training_execution`."""
        return training_execution(self.execution, self.model, layout, images // self.replicas, self.mesh)

    def divided(self, layout: Layout, images: int) -> sharding.Divided:
        """What the mesh axis `tensor` divides in a program."""
        return divided_of(self.model, layout, images // self.replicas, self.mesh)

    def compile_update(self, layout: Layout, images: int) -> tuple[jax.stages.Compiled, float]:
        """Compiles an update from one microbatch.

        Args:
          layout: slots of the sequence.
          images: global number of images.

        Returns:
          The program, and the seconds that the compilation took.

        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the program does not fit the chip.
        """
        programs, state = self._programs(layout, images)
        return self._compile(programs.step, state, None, layout, abstract_batch(self.model, layout, images, self.mesh))

    def compile_microbatch(self, layout: Layout, images: int) -> tuple[jax.stages.Compiled, float]:
        """Compiles the gradient of one microbatch of a larger update; see `compile_update`."""
        programs, state = self._programs(layout, images)
        batch = abstract_batch(self.model, layout, images, self.mesh)
        sums = self._sums(programs, state, layout, batch)
        return self._compile(programs.add, state, sums, None, layout, batch, self._scalar(int), self._scalar(float))

    def compile_apply(self, layout: Layout, images: int) -> tuple[jax.stages.Compiled, float]:
        """Compiles the update from the sums over microbatches; see `compile_update`."""
        programs, state = self._programs(layout, images)
        sums = self._sums(programs, state, layout, abstract_batch(self.model, layout, images, self.mesh))
        return self._compile(programs.apply, state, sums)

    def compile_sampler(self, layout: Layout, images: int) -> tuple[tuple[jax.stages.Compiled, float], ...]:
        """Compiles the programs that draw images during training: keys and values of the prefix, and one step.

        Args:
          layout: slots of the sequence.
          images: global number of images, a multiple of the number of shards of a batch.

        Returns:
          Each program, and the seconds that its compilation took.
        """
        execution = execution_on(self.execution, self.mesh)
        batch, ema = abstract_batch(self.model, layout, images, self.mesh), self._state().ema

        def prefill(model: MMDiT, cond: Conditioning) -> Any:
            return model.prefill(layout, cond, execution)

        prefix, seconds = self._compile(jax.jit(prefill), ema, batch.cond)
        shapes = jax.eval_shape(prefill, ema, batch.cond)
        past = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            tuple(prefix.output_shardings),
        )
        t_B = jax.ShapeDtypeStruct((images,), jnp.float32, sharding=sharding.batch_sharding(self.mesh))
        step = jax.jit(lambda model, x, t, cond, past: model.decode(layout, x, t, cond, past, execution))
        return (prefix, seconds), self._compile(step, ema, batch.latents_BNC, t_B, batch.cond, past)

    def state_bytes(self, accumulate: bool) -> dict[str, int]:
        """Bytes of one chip for the training state, and for the sums of gradients over microbatches."""
        state = self._state()
        parameters = bytes_of(state.model)
        found = {"parameters": parameters, "EMA": bytes_of(state.ema), "optimizer": bytes_of(state.optimizer)}
        return found | ({"gradient sums": parameters} if accumulate else {})

    @property
    def resident(self) -> int:
        """Bytes of one chip that stay while a microbatch of a larger update runs, which does not read them."""
        state = self.state_bytes(accumulate=True)
        return state["EMA"] + state["optimizer"]

    @property
    def replicas(self) -> int:
        return self.mesh.shape["data"]

    def _programs(self, layout: Layout, images: int) -> tuple[Programs, TrainState]:
        optimizer = make_optimizer(self.optimizer)
        loss = make_loss(LogitNormal(), Objective(Shift(), self.execution_of(layout, images)))
        programs = make_programs(
            loss, optimizer, 0.9999, 0, self.mesh, replicas=self.replicas, sum_dtype=self.execution.replica_sum
        )
        return programs, self._state()

    def _state(self) -> TrainState:
        return abstract_state(lambda key: MMDiT(self.model, key=key), make_optimizer(self.optimizer), self.mesh)

    def _sums(self, programs: Programs, state: TrainState, layout: Layout, batch: Batch) -> Any:
        like = jax.eval_shape(lambda state, batch: programs.gradient(state, None, layout, batch, 0), state, batch)
        return abstract(like, sharding.shardings(like, self.mesh, leading_dims(self.replicas)))

    def _scalar(self, kind: type) -> jax.ShapeDtypeStruct:
        placed = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((), jnp.int32 if kind is int else jnp.float32, sharding=placed)

    def _compile(self, program: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
        return compile_for(self.mesh, program, *arguments)


def compile_for(mesh: Mesh, program: jax.stages.Wrapped, *arguments: Any) -> tuple[jax.stages.Compiled, float]:
    """Compiles a program for the chips of a mesh, with the options of their generation.

    Returns:
      The program, and the seconds that the compilation took.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the program does not fit the chip.
    """
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile(compiler.options_for(mesh.devices.flat))
    return compiled, time.perf_counter() - start


def abstract_batch(config: MMDiTConfig, layout: Layout, images: int, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch, as the loader yields it."""
    placed = sharding.batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=placed)

    conditions = array(sum(layout.conditions), config.latent_channels) if layout.conditions else None
    return Batch(
        latents_BNC=array(layout.target, config.latent_channels),
        cond=Conditioning(
            text_BTE=array(sum(layout.text), config.text_width, dtype=jnp.bfloat16),
            positions_BS3=array(layout.length, 3, dtype=jnp.int32),
            valid_BS=array(layout.length, dtype=bool),
            conditions_BMC=conditions,
        ),
    )


def bytes_of(tree: Any) -> int:
    """Bytes of a tree, which may be abstract, on one chip."""
    return sum(
        jnp.dtype(leaf.dtype).itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Memory of one chip, as the compiler reports it."""
    stats = compiled.memory_analysis()
    assert stats is not None  # the TPU compiler always has it
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
