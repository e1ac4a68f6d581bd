"""A cache of compiled programs in the user's cache folder, for commands without an output folder.

A training run keeps its programs in its output folder instead, see `devices.set_compilation_cache`.
"""

import os
import pathlib
import time

VARIABLE = "QI2_COMPILATION_CACHE"
OFF = ("", "0", "off", "none")
MAX_BYTES = 2 << 30
ORPHAN_SECONDS = 60.0


def folder() -> pathlib.Path | None:
    """The cache folder: that of `QI2_COMPILATION_CACHE`, else `qi2/compiled` in the user's cache; None if it is off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in OFF else pathlib.Path(chosen).expanduser().absolute()
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "qi2" / "compiled"
    except RuntimeError:  # this user has no home
        return None


def use() -> None:
    """Keeps compiled programs between commands, at most `MAX_BYTES`; the least recently used are deleted first.

    Changes nothing if JAX has a cache folder already (`JAX_COMPILATION_CACHE_DIR`), or if the folder cannot be written.
    Call this before anything is compiled.
    """
    import jax

    place = folder()
    if place is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_orphans(place)
    except OSError:
        return
    if not os.access(place, os.W_OK | os.X_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_orphans(place: pathlib.Path) -> None:
    """Removes programs whose time of use a killed process did not write, which would stop JAX's eviction."""
    for path in place.glob("*-cache"):
        used = path.with_name(path.name.removesuffix("-cache") + "-atime")
        if not used.exists() and time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
            path.unlink(missing_ok=True)
