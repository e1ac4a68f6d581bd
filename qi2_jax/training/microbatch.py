"""The unit that a compiled training program reads. Gradient accumulation adds several of them up to one update."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from qi2_jax import sharding
from qi2_jax.training.mean import Mean

PADDING = "batch/padding"  # share of the slots without a token
USEFUL = "batch/useful"  # share of the model FLOPs that the tokens would take without padding


class Stats(NamedTuple):
    """Logged values of a microbatch.

    Attributes:
      images: global number of images.
      slots: global number of slots in the joint sequences, padding included.
      flops: model FLOPs of all slots, see `qi2_jax.models.flops`; 0 where no formula is known.
      metrics: further values by metric name. They describe the rows of this process and are averaged over processes.
    """

    images: int = 0
    slots: int = 0
    flops: float = 0.0
    metrics: Mapping[str, float | Mean] = {}


class Microbatch(NamedTuple):
    """One batch of an update.

    Attributes:
      layout: hashable description of the shapes, which selects the compiled program.
      batch: pytree that the loss reads. On the host it has the rows of this process, on the mesh all rows.
      first: index of its first image within the update.
      weight: its share of the update's images, in (0, 1].
      stats: values to log about it.
    """

    layout: Any
    batch: Any
    first: Any = 0
    weight: Any = 1.0
    stats: Stats = Stats()


def as_update(microbatches: Iterable[Microbatch]) -> Sequence[Microbatch]:
    """The microbatches of one update, each with its first image and its weight."""
    microbatches = list(microbatches)
    images = sum(microbatch.stats.images for microbatch in microbatches)
    placed, first = [], 0
    for microbatch in microbatches:
        placed.append(microbatch._replace(first=first, weight=microbatch.stats.images / images))
        first += microbatch.stats.images
    return placed


def put(mesh: Mesh, microbatch: Microbatch) -> Microbatch:
    """Copies a microbatch of host arrays to the mesh."""
    with _explicitly():
        return microbatch._replace(batch=sharding.put_batch(mesh, microbatch.batch, microbatch.stats.images))


def put_scalar(mesh: Mesh, value: Any) -> jax.Array:
    """Copies a NumPy scalar, equal in all processes, to every device of the mesh."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with _explicitly():
        return jax.make_array_from_callback((), replicated, lambda _: value)


def _explicitly() -> AbstractContextManager[None]:
    """A block that may copy to the devices. JAX treats arrays made from callbacks as implicit transfers."""
    return jax.transfer_guard_host_to_device("allow")
