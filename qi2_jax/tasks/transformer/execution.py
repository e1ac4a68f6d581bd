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

    With `keep: fit` it keeps as much as `activations_gib` has room for. The axis `tensor` divides images if there are
    enough of them, else tokens if their number and that of the heads allow it, else heads; see `sharding.DIVIDED`.

    Args:
      config: group `transformer.execution` of the config.
      model: architecture of the transformer.
      layout: slots of the program's sequences.
      images: number of images of one replica.
      mesh: devices.
    """
    chips, keep = mesh.shape["fsdp"] * mesh.shape["tensor"], config.keep
    if keep == FIT:
        unit = images * layout.length / chips * model.width * jnp.dtype(config.dtype).itemsize
        keep = recomputation.richest(config.activations_gib * GIB / unit, model.layers, model.mlp_ratio)
    without = sharding.RULES["replicas"] if mesh.shape["data"] > 1 else ()
    return _execution(config, mesh, keep, without, divided_of(model, layout, images, mesh))


def divided_of(model: MMDiTConfig, layout: Layout, images: int, mesh: Mesh) -> sharding.Divided:
    """What the axis `tensor` divides in a program; see `training_execution`."""
    tensor = mesh.shape["tensor"]
    if tensor > 1 and images % (mesh.shape["fsdp"] * tensor) == 0:
        return "images"
    # Where chips divide tokens, they divide heads in attention.
    return "sequence" if tensor > 1 and layout.length % tensor == model.heads % tensor == 0 else "heads"


def _execution(
    config: ExecutionConfig,
    mesh: Mesh,
    keep: str,
    without: tuple[str, ...] = (),
    divided: sharding.Divided = "heads",
) -> Execution:
    return Execution(
        config.dtype,
        sharding.Attention(mesh, config.kernel, without, divided),
        config.remat,
        keep,
        sharding.Constrain(mesh, without, divided),
        sharding.Gather(mesh, divided, config.dtype),
        config.blocks_per_step,
        jnp.promote_types(config.dtype, config.shard_sum),
    )
