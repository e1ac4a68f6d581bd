"""Whether a job may write into a folder."""

import pathlib

from qi2_jax.runtime import lock
from qi2_jax.runtime.atomic import leftovers


def is_usable(out: pathlib.Path, record: str, compilation_cache: str = "") -> bool:
    """Whether a folder is missing, empty, or belongs to a job, including one that was killed when it started.

    Args:
      out: folder of the job.
      record: name of the file in which a job of this kind records its config.
      compilation_cache: path of the compiled programs, as in the config.
    """
    if (out / record).is_file() or not out.exists():
        return True
    # Compiled programs may be there before the config is recorded: another process of this job writes them.
    programs = out / compilation_cache
    allowed = {out / lock.NAME, programs, *programs.parents, *leftovers(out / record)}
    return out.is_dir() and {*out.iterdir()} <= allowed
