"""Options of the XLA compiler for each generation of chips, with the reason of each.

They hold for every program: training, planning and sampling. What they do was read from the schedules of programs that
libtpu 0.0.42 compiled (`qi2 plan`); nobody has measured them on chips. Without them, every collective of the training
step is synchronous. v5p and v6e chips have SparseCores, which run collectives while the matrix units compute. v5e has
none: there a gather advances inside matrix products, and a sum of gradients is overlapped only over one ring of the
torus.

Missing on purpose, as libtpu 0.0.42 fails with them:
`xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter`, on programs that divide tokens over chips, and
`xla_tpu_enable_sparse_core_collective_offload_dense_all_to_all`, on our sizes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import jax


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of the compiler.

    Attributes:
      name: name in XLA.
      value: its value.
      reason: what it changes in our programs.
    """

    name: str
    value: str
    reason: str


_OVERLAP = (
    Option("xla_enable_async_all_gather", "true", "weights are gathered in the background"),
    Option("xla_enable_async_all_reduce", "true", "so are sums of gradients"),
    Option("xla_tpu_enable_async_collective_fusion", "true", "a gather advances inside the matrix products before it"),
    Option("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "applies that to gathers"),
    Option("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", "applies it to sums across replicas"),
    Option("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "several products may hide one gather"),
    Option("xla_tpu_overlap_compute_collective_tc", "true", "lets the scheduler place products beside collectives"),
)

_SPARSE_CORES = (
    Option("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true", "SparseCores gather weights"),
    Option("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true", "also over two dims of the torus"),
    Option("xla_tpu_enable_sparse_core_collective_offload_3d_all_gather", "true", "also over three dims, as v5p has"),
    Option("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true", "they sum and scatter gradients"),
    Option("xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", "true", "also over several dims"),
    Option("xla_tpu_enable_sparse_core_collective_offload_all_reduce", "true", "they sum across replicas"),
    Option(
        "xla_tpu_enable_sparse_core_offload_queuing_in_lhs",
        "true",
        "the scheduler queues one collective behind another: 2% more of stage 4 is overlapped",
    ),
    Option("xla_tpu_enable_async_all_to_all", "true", "tokens are exchanged for heads in the background"),
)

_KERNELS = (
    Option(
        "xla_tpu_scoped_vmem_limit_kib",
        "32768",
        "attention with blocks of 2,048 keys needs 17.3 MiB of fast memory, and the default limit is 16",
    ),
)

# Keyed by the `device_kind` that JAX reports.
OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "TPU v5 lite": _OVERLAP + _KERNELS,
    "TPU v5": _OVERLAP + _SPARSE_CORES + _KERNELS,
    "TPU v6 lite": _OVERLAP + _SPARSE_CORES,
}


def options_for(devices: Iterable[Any]) -> dict[str, str | bool]:
    """The compiler options for programs on these devices; none on other platforms."""
    return {option.name: option.value for option in OPTIONS.get(next(iter(devices)).device_kind, ())}


class Jitted(Protocol):
    """A function that `jit` decorates."""

    def __call__(self, *values: Any, **named: Any) -> Any: ...

    def compiled(self) -> jax.stages.Wrapped:
        """The function of `jax.jit`."""
        ...


def jit(**arguments: Any) -> Callable[[Callable[..., Any]], Jitted]:
    """A decorator like `jax.jit`, with the options for the devices of this process.

    They are unknown when a module is imported, and are therefore looked up in the first call. The result cannot be
    called inside another compiled program.

    Args:
      arguments: arguments of `jax.jit`.
    """

    def decorate(function: Callable[..., Any]) -> Jitted:
        @functools.cache
        def compiled() -> jax.stages.Wrapped:
            return jax.jit(function, compiler_options=options_for(jax.devices()) or None, **arguments)

        @functools.wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            return compiled()(*values, **named)

        call.compiled = compiled  # type: ignore[attr-defined]
        return cast(Jitted, call)

    return decorate
