"""Exclusive lock on an output folder."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from qi2_jax.runtime import processes

NAME = ".lock"
_held: set[pathlib.Path] = set()


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other programs from working in `folder`, which is created if missing.

    The operating system releases the lock when the process ends, in whatever way. The file `.lock` stays and means
    nothing by itself. A process may hold the lock more than once. Process 0 of a program holds it for all of them.

    Raises:
      ValueError: if another program holds the lock. It names that process, and is raised in all processes.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    with contextlib.ExitStack() as stack:
        with processes.agreed():
            if jax.process_index() == 0:
                _lock(folder, stack)
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def _lock(folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(open(folder / NAME, "a+"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            raise ValueError(
                f"another process works in {folder} ({file.read(200).strip()}); wait for it, stop it, or choose "
                "another --out"
            ) from None
        error.filename = str(folder / NAME)
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
