"""Ahead-of-time compilation of the transformer's training step for a TPU topology, on a machine without TPUs.

What is compiled are the functions that train (`training.step`, `training.mmdit`), on shapes instead of arrays. The
compiler reports the memory a chip needs, or fails as it would on the pod.
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
from qi2_jax.tasks.transformer import objective as transformer_training
from qi2_jax.training import step as steps
from qi2_jax.training.optimizer import Optimizer

OPTIMIZER = Optimizer(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, clip=1.0, warmup=1000, decay_steps=0)
GIB = 2**30


def topology_mesh(name: str, shape: sharding.MeshShape, num_slices: int = 1) -> Mesh:
    """A mesh over the chips of a topology that need not be present.

    Args:
      name: generation and chips along each axis of the torus of one slice, such as "v6e:16x16" or "v5p:2x2x4".
      shape: how the training axes are laid over the chips of all slices.
      num_slices: slices of that topology, joined by the network of the data center.

    Raises:
      ValueError: if libtpu is not installed, the topology is unknown, the mesh has another number of chips, or it does
        not split over the slices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu, which is not installed: pip install 'qi2[tpu]'")
    # No TPU is attached: do not ask the cloud for one, nor claim one from other processes.
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
    """Bytes of one chip. Outputs that take over the memory of arguments are counted in `aliased` too."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    peak: int  # the compiler's own estimate of what is alive at a time, without fragmentation

    @property
    def total(self) -> int:
        """What must fit."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code


@dataclasses.dataclass(frozen=True)
class Report:
    """What a training step needs.

    Attributes:
      chips: how many.
      images: global batch.
      compute_seconds: executed operations at the chips' peak rate.
      gather_seconds: weights of the blocks in the compute dtype, gathered for the forward and the backward pass, and
        their gradients reduced, at the bandwidth of the links; hidden where the compiler overlaps it with computation.
        What crosses slices is not in it: that network's bandwidth is a matter of the data center.
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
        """No step can be shorter."""
        return max(self.compute_seconds, self.gather_seconds)

    def lines(self) -> list[str]:
        """The report as text."""
        memory, peak = self.memory, self.chips * self.chip.flops
        return [
            f"{self.chips} x {self.chip.name}, {self.images} images, compiled in {self.compile_seconds:.0f} s",
            f"HBM per chip {memory.total / GIB:.2f} of {self.chip.hbm_bytes / GIB:.2f} GiB: arguments "
            f"{memory.arguments / GIB:.2f}, temporaries {memory.temporaries / GIB:.2f}, outputs "
            f"{memory.outputs / GIB:.2f}, of them aliased {memory.aliased / GIB:.2f}, code {memory.code / GIB:.2f}; "
            f"peak {memory.peak / GIB:.2f}",
            f"FLOPs per step: model {self.flops.model:.3e}, of them attention {3 * self.flops.attention:.3e}; "
            f"executed {self.compute_seconds * peak:.3e}",
            f"roofline {self.roofline_seconds:.3f} s (arithmetic {self.compute_seconds:.3f}, weights over the links "
            f"{self.gather_seconds:.3f}): at most {self.flops.model / peak / self.roofline_seconds:.0%} utilisation, "
            f"{self.images / self.roofline_seconds / self.chips:.3f} images a second and chip",
        ]


def compile_train_step(
    config: MMDiTConfig,
    layout: Layout,
    mesh: Mesh,
    *,
    images: int | None = None,
    dtype: Any = jnp.bfloat16,
    remat: bool = True,
    kernel: Any = "auto",
) -> tuple[Report, jax.stages.Compiled]:
    """Compiles the training step of the transformer.

    Args:
      config: the model.
      layout: slots of the sequence.
      mesh: see `topology_mesh`.
      images: global batch; None: one per device along `data` and `fsdp`.
      dtype: dtype of computation; parameters, moments and EMA are fp32.
      remat: recompute blocks in the backward pass.
      kernel: attention kernel on each device.

    Returns:
      The report, and the compiled program for those who read its HLO.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the step does not fit the chip.
      ValueError: for chips whose limits are unknown.
    """
    chip, images = chip_of(mesh), images or mesh.shape["data"] * mesh.shape["fsdp"]
    run = Execution(dtype, sharding.Attention(mesh, kernel), remat, sharding.Constrain(mesh))
    optimizer = steps.make_optimizer(OPTIMIZER)
    state = steps.abstract_state(lambda key: MMDiT(config, key=key), optimizer, mesh)
    loss = transformer_training.make_loss(LogitNormal(), transformer_training.Objective(Shift(), run))
    step = steps.make_programs(loss, optimizer, 0.9999, 0, mesh).step

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
        _memory(compiled),
        flops,
        compute_seconds=flops.executed(remat) / (mesh.size * chip.flops),
        gather_seconds=3 * gathered / chip.ici_bandwidth,
        compile_seconds=seconds,
    )
    return report, compiled


def abstract_batch(config: MMDiTConfig, layout: Layout, images: int, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a global batch as the loader delivers it."""
    placed = sharding.batch_sharding(mesh)

    def array(*shape, dtype=jnp.float32):
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


def _memory(compiled: jax.stages.Compiled) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None  # only some back ends lack the analysis
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
