"""Writes files that are either complete or absent, whenever the process dies."""

import glob
import json
import os
import socket
from pathlib import Path
from typing import Any

_HOST = socket.gethostname()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to a temporary file in the same folder, flushes it to disk, and renames it to `path`.

    Temporary files that killed processes of this machine left behind are removed.

    Raises:
      OSError: if writing fails, for instance on a full disk. It names `path`, which is unchanged.
    """
    for leftover in leftovers(path):
        host, _, pid = leftover.name.removeprefix(f".{path.name}.").removesuffix(".partial").rpartition("-")
        if host == _HOST and pid.isdecimal() and not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(path: Path) -> list[Path]:
    """Returns the temporary files for `path`, of writes in progress and of processes that died."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.partial"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically.

    Raises:
      ValueError: for NaN and infinity, which JSON does not have.
      OSError: see `write_atomic`.
    """
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
