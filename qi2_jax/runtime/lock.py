"""Exclusive lock on an output folder."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

NAME = ".lock"
_held: set[pathlib.Path] = set()


@contextlib.contextmanager
def hold(folder: pathlib.Path, *, remove: bool = False) -> Iterator[None]:
    """Keeps other programs from working in `folder`, which is created if missing.

    The operating system releases the lock when the process ends, in whatever way. The file `.lock` stays; it does not
    mean that the lock is held. A process may take the lock more than once. Process 0 holds it for all processes.

    Args:
      remove: see `exclusive`.

    Raises:
      ValueError: if another program holds the lock. It names that process, and is raised in all processes.
    """
    import jax  # a lock for one process needs neither JAX nor its devices

    from qi2_jax.runtime import processes

    folder = folder.resolve()
    if folder in _held:
        yield
        return
    with contextlib.ExitStack() as stack:
        with processes.raise_together():
            if jax.process_index() == 0:
                stack.enter_context(exclusive(folder, remove=remove))
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, *, remove: bool = False) -> Iterator[None]:
    """Keeps other processes from working in `folder`, which is created if missing.

    The operating system releases the lock when the process ends, in whatever way.

    Args:
      remove: whether to delete the lock file at the end. A lock file that stays does not mean that the lock is held.

    Raises:
      ValueError: if another process holds the lock; the message names that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        with open(path, "a+") as file:
            _lock(file, folder)
            if not _is_at(file, path):  # its holder deleted it between our two calls
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)
            return


def _lock(file: TextIO, folder: pathlib.Path) -> None:
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


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
