"""Devices of a process: the platform, fake CPU devices, and the compilation cache."""

import pathlib
from collections.abc import Sequence
from typing import Any


def set_platform(config: Any, meshes: Sequence[Any], processes: int = 1) -> None:
    """For `config.platform == "cpu"`, makes JAX see as many CPU devices as the largest mesh needs of each process.

    Must run before JAX is first used. On accelerators (`config.platform == ""`) nothing is changed.

    Raises:
      ValueError: if the processes cannot share the devices.
    """
    if config.platform == "cpu":
        import jax

        devices = max(mesh.data * mesh.fsdp * mesh.tensor for mesh in meshes)
        if devices % processes:
            raise ValueError(f"{processes} processes cannot share the {devices} devices of the mesh evenly")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // processes)


def set_compilation_cache(config: Any, out: pathlib.Path) -> None:
    """Lets compiled programs be kept from one start to the next, where `config.compilation_cache` names a place."""
    import jax

    if place := config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", place if "://" in place else str(out.absolute() / place))
