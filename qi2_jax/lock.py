"""One process at a time in a folder that is trained or made in."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

NAME = ".lock"
_held: set[pathlib.Path] = set()


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from working in `folder`, which is made if missing.

    The system drops the lock with the process, however that ends; the file `.lock` stays and means nothing by itself.
    Within a process it may be held again. Of the processes of one distributed program only the first holds it.

    Raises:
      ValueError: if another process holds it, saying which.
    """
    folder = folder.resolve()
    if folder in _held or jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / NAME, "a+") as file:
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
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)
