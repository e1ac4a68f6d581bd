"""What the stages of a job share: reading and checking their configs; and the first of them, the autoencoder."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.training import loop

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def mesh_of(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a stage; on fake CPU devices a stage may use fewer than the job has, spread over all processes.

    Args:
      devices: to use; None: those of all processes.

    Raises:
      ValueError: if there are other devices than the mesh needs, or a process would have none of them.
    """
    shape, devices = sharding.MeshShape(**config), jax.devices() if devices is None else devices
    if jax.default_backend() == "cpu" and shape.size < len(devices):
        owners = {device.process_index for device in devices}
        devices = devices[:: len(devices) // shape.size][: shape.size]
        if without := sorted(owners - {device.process_index for device in devices}):
            raise ValueError(f"a mesh of {shape.size} devices leaves processes {without} without any; make it larger")
    return sharding.make_mesh(shape, devices)


def check_training(name: str, stage: Any, batch_sizes: Sequence[int]) -> None:
    try:
        for size in batch_sizes:
            sharding.own_rows(mesh_of(stage.mesh), size)
        loop.check(stage)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parts_of(mesh: Mesh, batch_size: int, images_per_device: int) -> tuple[int, int]:
    """In how many equal parts a batch is computed, and the global images of one part.

    Args:
      images_per_device: at most so many at once on each device along `data` and `fsdp`; 0: the whole batch.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    sharding.own_rows(mesh, batch_size)
    rows = batch_size // sharding.batch_parts(mesh)
    at_once = next(count for count in range(min(images_per_device or rows, rows), 0, -1) if rows % count == 0)
    return rows // at_once, at_once * sharding.batch_parts(mesh)


def dtype_of(name: str) -> Any:
    """The dtype of that name; raises a ValueError for others than `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; choose one of {sorted(DTYPES)}")
    return DTYPES[name]
