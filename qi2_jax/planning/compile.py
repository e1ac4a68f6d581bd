"""Ahead-of-time compilation of the transformer's training step for a TPU topology, on a machine without TPUs.

It compiles the functions with which a run trains (`training.step`, `tasks.transformer.objective`), on shapes instead of
arrays. The compiler reports the memory that a chip needs, or fails as it would on the pod.
"""

import dataclasses
import importlib.util
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipeline.loading.batch import Batch
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.models.flops import Flops, flops_per_step
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.runtime.chips import Chip, chip_of
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.objective import Objective, make_loss
from qi2_jax.training.optimizer import Optimizer
from qi2_jax.training.step import abstract_state, make_optimizer, make_programs

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
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu, which is not installed: pip install 'qi2[tpu]'")
    # No TPU is needed: do not query the cloud's metadata server, and do not lock a TPU that another process uses.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=num_slices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {name!r} is unknown to libtpu; write it like 'v6e:16x16': {error}") from error
    return sharding.make_mesh(shape, topology.devices)


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
class Report:
    """Memory, FLOPs and bounds of the time of a training step.

    Attributes:
      chip: kind of chip.
      chips: number of chips.
      images: global batch size.
      memory: memory of one chip.
      flops: operations by formula.
      compute_seconds: time of the executed operations at the chips' peak rate.
      gather_seconds: time to gather the blocks' weights in the compute dtype for the forward and the backward pass, and
        to reduce their gradients, at the bandwidth of the links. The compiler may overlap it with computation. Traffic
        between slices is not included, because the bandwidth of the data-center network is unknown.
      compile_seconds: time of the compilation.
    """

    chip: Chip
    chips: int
    images: int
    memory: Memory
    flops: Flops
    compute_seconds: float
    gather_seconds: float
    compile_seconds: float

    @property
    def roofline_seconds(self) -> float:
        """Lower bound of the step time."""
        return max(self.compute_seconds, self.gather_seconds)

    def lines(self) -> list[str]:
        """The report as text."""
        memory, peak = self.memory, self.chips * self.chip.flops
        return [
            f"{self.chips} x {self.chip.name}, {self.images} images, compiled in {self.compile_seconds:.0f} s",
            f"HBM per chip {memory.total / GIB:.2f} of {self.chip.hbm_bytes / GIB:.2f} GiB: arguments "
            f"{memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}, outputs "
            f"{memory.outputs / GIB:.2f}, of which aliased {memory.aliased / GIB:.2f}, code {memory.code / GIB:.2f}; "
            f"peak {memory.peak / GIB:.2f}",
            f"FLOPs per step: model {self.flops.model:.3e}, of which attention {3 * self.flops.attention:.3e}; "
            f"executed {self.compute_seconds * peak:.3e}",
            f"roofline {self.roofline_seconds:.3f} s (arithmetic {self.compute_seconds:.3f}, weights over the links "
            f"{self.gather_seconds:.3f}): at most {self.flops.model / peak / self.roofline_seconds:.0%} utilisation, "
            f"{self.images / self.roofline_seconds / self.chips:.3f} images per second and chip",
        ]


def compile_train_step(
    config: MMDiTConfig,
    layout: Layout,
    mesh: Mesh,
    *,
    images: int | None = None,
    dtype: Any = jnp.bfloat16,
    remat: bool = True,
    keep: str = "inputs",
    kernel: Any = "auto",
) -> tuple[Report, jax.stages.Compiled]:
    """Compiles the training step of the transformer.

    Args:
      config: architecture of the transformer.
      layout: slots of the sequence.
      mesh: see `topology_mesh`.
      images: global batch size; None: one image per device along `data` and `fsdp`.
      dtype: dtype of computation; parameters, moments and EMA are fp32.
      remat: whether the backward pass recomputes the blocks.
      keep: what it keeps of each block if it does, see `Execution`.
      kernel: attention kernel on each device.

    Returns:
      The report, and the compiled program with its HLO.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the step does not fit the chip.
      ValueError: for chips whose limits are unknown.
    """
    chip, images = chip_of(mesh), images or mesh.shape["data"] * mesh.shape["fsdp"]
    execution = Execution(dtype, sharding.Attention(mesh, kernel), remat, keep, sharding.Constrain(mesh))
    optimizer = make_optimizer(OPTIMIZER)
    state = abstract_state(lambda key: MMDiT(config, key=key), optimizer, mesh)
    loss = make_loss(LogitNormal(), Objective(Shift(), execution))
    step = make_programs(loss, optimizer, 0.9999, 0, mesh).step

    start = time.perf_counter()
    compiled = step.lower(state, None, layout, abstract_batch(config, layout, images, mesh)).compile()
    seconds = time.perf_counter() - start

    flops = flops_per_step(config, layout, images)
    block_weights = sum(leaf.size for leaf in jax.tree.leaves(state.model.blocks)) * jnp.dtype(dtype).itemsize
    gathered = block_weights / mesh.shape["tensor"] * (1 - 1 / mesh.shape["fsdp"])
    report = Report(
        chip,
        mesh.size,
        images,
        memory_of(compiled),
        flops,
        compute_seconds=flops.executed(config, keep if remat else None) / (mesh.size * chip.flops),
        gather_seconds=3 * gathered / chip.ici_bandwidth,
        compile_seconds=seconds,
    )
    return report, compiled


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
