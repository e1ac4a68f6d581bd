"""How a job uses its devices: meshes, microbatches and the dtypes of its computations."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.sharding import MeshShape

COMPUTE_DTYPES = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run; with fake CPU devices it may have fewer devices than the job, spread over all processes.

    Args:
      shape: number of devices along each axis.
      devices: devices to use; None: devices of all processes.

    Raises:
      ValueError: if the number of devices differs from the mesh's, or a process would have none of them.
    """
    devices = jax.devices() if devices is None else devices
    if jax.default_backend() == "cpu" and shape.size < len(devices):
        owners = {device.process_index for device in devices}
        devices = devices[:: len(devices) // shape.size][: shape.size]
        if without := sorted(owners - {device.process_index for device in devices}):
            raise ValueError(
                f"a mesh of {shape.size} devices leaves the processes {without} without a device; make it larger"
            )
    return sharding.make_mesh(shape, devices)


def check_batch_sizes(name: str, shape: MeshShape, batch_sizes: Sequence[int]) -> None:
    """Raises a ValueError, with the name of the config's group, if batches do not split over the mesh."""
    try:
        for size in batch_sizes:
            sharding.local_rows(make_mesh(shape), size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def microbatches_of(
    mesh: Mesh, batch_size: int, images_per_device: int, slots_per_device: int = 0, slots: int = 1
) -> tuple[int, int]:
    """The number of equal microbatches of a batch, and the images of one microbatch over all devices.

    Args:
      mesh: devices of the run.
      batch_size: images of the batch.
      images_per_device: largest number of images of a microbatch on each device along `data` and `fsdp`; 0: the whole
        batch.
      slots_per_device: largest number of slots of such a microbatch, unless one image has more; 0: any number.
      slots: slots of one image.

    Raises:
      ValueError: if the batch cannot be split over the mesh.
    """
    sharding.local_rows(mesh, batch_size)
    rows = batch_size // sharding.num_batch_shards(mesh)
    most = min(images_per_device or rows, rows)
    if slots_per_device:
        most = max(1, min(most, slots_per_device // slots))
    at_once = next(count for count in range(most, 0, -1) if rows % count == 0)
    return rows // at_once, at_once * sharding.num_batch_shards(mesh)


def encoder_dtype(fingerprint: dict[str, Any]) -> jnp.dtype:
    """The dtype in which the encoders made samples, by the samples' fingerprint; float32 if it does not name one.

    Raises:
      ValueError: for a dtype that the encoders do not have.
    """
    name = fingerprint.get("dtype", "float32")
    if name not in COMPUTE_DTYPES:
        raise ValueError(
            f"samples were encoded in dtype {name!r}, which is unknown; encode them again in {[*COMPUTE_DTYPES]}"
        )
    return COMPUTE_DTYPES[name]
