"""Sets the platform, the number of fake CPU devices, and the compilation cache of a process."""

import pathlib
from collections.abc import Sequence
from typing import Any


def set_platform(config: Any, meshes: Sequence[Any], processes: int = 1) -> None:
    """With `config.platform == "cpu"`, gives JAX as many CPU devices as the largest mesh needs from each process.

    This must run before JAX is first used. With `config.platform == ""` it changes nothing: JAX chooses accelerators.

    Args:
      config: an experiment's config.
      meshes: mesh shapes of all parts of the job.
      processes: number of processes that share the devices.

    Raises:
      ValueError: if the processes cannot share the devices evenly.
    """
    if config.platform == "cpu":
        import jax

        devices = max(mesh.data * mesh.fsdp * mesh.tensor for mesh in meshes)
        if devices % processes:
            raise ValueError(f"{processes} processes cannot share the {devices} devices of the mesh evenly")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // processes)


def set_compilation_cache(config: Any, out: pathlib.Path) -> None:
    """Keeps compiled programs for the next start, in the place that `config.compilation_cache` names.

    Args:
      config: an experiment's config; without the key nothing happens.
      out: output folder; relative places are inside it.
    """
    import jax

    if place := config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", place if "://" in place else str(out.absolute() / place))
