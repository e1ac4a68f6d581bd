"""How the transformer runs on a mesh: kernels, shardings, and what the backward pass of a program keeps."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.models import recomputation
from qi2_jax.models.mmdit import Execution, MMDiTConfig
from qi2_jax.sequence import Layout
from qi2_jax.tasks.transformer.config import FIT, ExecutionConfig

GIB = 2**30


def execution_on(config: ExecutionConfig, mesh: Mesh, *, apart: bool = False) -> Execution:
    """The execution of a model whose batch is sharded over the mesh.

    Args:
      config: group `transformer.execution` of the config.
      mesh: devices.
      apart: whether the model runs inside a `jax.vmap` over the mesh axis `data`, see `step.make_programs`.
    """
    without = sharding.RULES["replicas"] if apart else ()
    return Execution(
        config.dtype,
        sharding.Attention(mesh, config.kernel, without),
        config.remat,
        "inputs" if config.keep == FIT else config.keep,
        sharding.Constrain(mesh, without),
        sharding.Gather(mesh),
        config.blocks_per_step,
    )


def with_policy(
    execution: Execution, config: ExecutionConfig, model: MMDiTConfig, layout: Layout, images: int, mesh: Mesh
) -> Execution:
    """The execution of one program, in which `keep: fit` becomes the richest policy whose values fit `kept_gib`.

    Args:
      execution: result of `execution_on`.
      config: group `transformer.execution` of the config.
      model: architecture of the transformer.
      layout: slots of the program's sequences.
      images: number of images that the devices along `fsdp` compute at once.
      mesh: devices.
    """
    if config.keep != FIT:
        return execution
    tokens = images * layout.length / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    unit = tokens * model.layers * model.width * jnp.dtype(config.dtype).itemsize
    return dataclasses.replace(execution, keep=recomputation.richest(config.kept_gib * GIB / unit, model.mlp_ratio))
