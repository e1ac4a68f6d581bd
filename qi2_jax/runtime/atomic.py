"""Files that are either whole or absent, whenever the process dies."""

import glob
import json
import os
import socket
from pathlib import Path
from typing import Any

_HOST = socket.gethostname()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to a temporary name in the same folder, flushes it to the disk, and renames it to `path`.

    What killed processes of this machine left of earlier attempts is removed.

    Raises:
      OSError: when that fails, as on a full disk, naming `path`, which is then as it was before.
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
    """Temporary files of writes of `path` that are under way, or ended with their process."""
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
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which are not JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
