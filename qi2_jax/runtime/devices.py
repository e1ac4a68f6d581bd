"""Sets the platform, the number of fake CPU devices, the host's allocator, and the compilation cache of a process."""

import ctypes
import pathlib
from collections.abc import Sequence
from typing import Any

# Numbers of malloc.h: M_TRIM_THRESHOLD (-1: never), M_MMAP_THRESHOLD (the largest int), and M_ARENA_MAX.
MALLOC_OPTIONS = {-1: -1, -3: 2**31 - 1, -8: 1}


def set_platform(config: Any, meshes: Sequence[Any], processes: int = 1) -> None:
    """With `config.platform == "cpu"`, gives JAX as many CPU devices as the largest mesh needs from each process.

    This must run before JAX is first used. On CPU, the process also keeps freed memory, see `keep_freed_memory`. With
    `config.platform == ""` it changes nothing: JAX chooses accelerators.

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
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory for this process, also that of large arrays.

    XLA's CPU backend allocates the temporaries of a program at each call. By default glibc maps such blocks and unmaps
    them when they are freed, so that each training step pays for clearing all of its pages again. Only the main arena
    can keep large blocks, so all threads share it. This must run before JAX starts its threads. The peak of the memory
    stays the same, but the process holds it until it ends. It does nothing on systems without glibc's `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def set_compilation_cache(config: Any, out: pathlib.Path) -> None:
    """Keeps compiled programs for the next start, in the place that `config.compilation_cache` names.

    Args:
      config: an experiment's config; without the key nothing happens.
      out: output folder; relative places are inside it.
    """
    import jax

    if place := config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", place if "://" in place else str(out.absolute() / place))
