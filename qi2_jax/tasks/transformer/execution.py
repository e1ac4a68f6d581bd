"""How the transformer runs on a mesh: kernels, shardings, and what the backward pass of a program keeps."""

import jax.numpy as jnp
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.models import recomputation
from qi2_jax.models.mmdit import Execution, MMDiTConfig
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.config import FIT, ExecutionConfig

GIB = 2**30


def execution_on(config: ExecutionConfig, mesh: Mesh) -> Execution:
    """The execution of a model whose batch is sharded over the mesh, outside of training."""
    return _execution(config, mesh, "inputs" if config.keep == FIT else config.keep)


def training_execution(
    config: ExecutionConfig, model: MMDiTConfig, layout: Layout, images: int, mesh: Mesh
) -> Execution:
    """The execution of one training program, inside the `jax.vmap` over replicas of `step.make_programs`.

    With `keep: fit` it keeps what fits `kept_gib`. If there are enough images, each chip along `tensor` has images of
    its own, see `sharding.SPREAD`.

    Args:
      config: group `transformer.execution` of the config.
      model: architecture of the transformer.
      layout: slots of the program's sequences.
      images: number of images of one replica.
      mesh: devices.
    """
    chips, keep = mesh.shape["fsdp"] * mesh.shape["tensor"], config.keep
    if keep == FIT:
        unit = images * layout.length / chips * model.layers * model.width * jnp.dtype(config.dtype).itemsize
        keep = recomputation.richest(config.kept_gib * GIB / unit, model.mlp_ratio)
    without = sharding.RULES["replicas"] if mesh.shape["data"] > 1 else ()
    return _execution(config, mesh, keep, without, mesh.shape["tensor"] > 1 and images % chips == 0)


def _execution(
    config: ExecutionConfig, mesh: Mesh, keep: str, without: tuple[str, ...] = (), spread: bool = False
) -> Execution:
    return Execution(
        config.dtype,
        sharding.Attention(mesh, config.kernel, without, spread),
        config.remat,
        keep,
        sharding.Constrain(mesh, without, spread),
        sharding.Gather(mesh, spread),
        config.blocks_per_step,
    )
