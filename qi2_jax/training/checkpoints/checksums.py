"""Checksums of a checkpoint's files: written by all processes after a save, read before a restore. Without JAX.

Every process hashes its share of the files into `STEP/checksums-PROCESS.json`; that of process 0 also lists all files.
On a network file system a process may see an older listing than process 0 and leave files out: the step then counts as
unverified.
The hash is BLAKE2b with 256 bits (`b2sum -l 256` prints the same): about 1 GB/s per thread on any 64-bit core, where
SHA-256 needs special instructions for that, and one flipped bit is never missed. hashlib lets go of the interpreter
while it hashes, so threads scale.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any

from qi2_jax.runtime.atomic import write_json_atomic
from qi2_jax.runtime.digests import of_file
from qi2_jax.training.checkpoints import files

_PREFIX, _ALGORITHM = "checksums-", "blake2b-256"
_THREADS = min(8, os.cpu_count() or 1)


class _Unreadable(Exception):
    """A file of checksums that holds none."""


def _digest(path: pathlib.Path) -> str:
    return of_file(path, lambda: hashlib.blake2b(digest_size=32)).hex()


def _is_checksums(name: str) -> bool:
    return "/" not in name and name.startswith(_PREFIX)


def record(step: pathlib.Path, process: int = 0, processes: int = 1) -> None:
    """Hashes this process's share of the files of a complete step; process 0 adds the manifest.

    Args:
      step: folder of the checkpoint, which all processes see.
      process: index of this process.
      processes: how many there are.
    """
    names = [name for name in files.files(step) if not _is_checksums(name) and name != files.MANIFEST]
    own = names[process::processes]
    if process == 0 and (step / files.MANIFEST).is_file():
        own.append(files.MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(step / name), own)
        entries = {
            name: {"bytes": (step / name).stat().st_size, _ALGORITHM: digest}
            for name, digest in zip(own, digests, strict=True)
        }
    found: dict[str, Any] = {"process": process, "processes": processes, "files": entries}
    if process == 0:
        found["all_files"] = sorted({*names, *own})
    write_json_atomic(step / f"{_PREFIX}{process}.json", found)


def _recorded(step: pathlib.Path) -> dict[str, dict[str, Any]] | None:
    """{file: its size and hash} from the checksums of all processes; None where a process's are missing, or where they
    are not of all files that process 0 saw, which older versions did not note."""
    entries: dict[str, dict[str, Any]] = {}
    present, wanted, seen = set(), set(), None
    for path in sorted(step.glob(f"{_PREFIX}*.json")):
        try:
            found = json.loads(path.read_bytes())
            present.add(found["process"])
            wanted |= set(range(found["processes"]))
            seen = set(found["all_files"]) if "all_files" in found else seen
            entries |= {name: {"bytes": e["bytes"], _ALGORITHM: e[_ALGORITHM]} for name, e in found["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Unreadable(f"{path.name} is unreadable: {type(error).__name__} {error}") from None
    complete = bool(present) and present == wanted
    return entries if complete and seen in (None, entries.keys()) else None


def is_recorded(step: pathlib.Path, processes: int) -> bool:
    """Whether so many processes have written their checksums, whatever is in them."""
    return all((step / f"{_PREFIX}{process}.json").is_file() for process in range(processes))


def is_verified(step: pathlib.Path) -> bool:
    """Whether a step has the checksums of all its files. No file is read again."""
    try:
        return _recorded(step) is not None
    except _Unreadable:
        return False


def problems(step: pathlib.Path, process: int = 0, processes: int = 1) -> list[str]:
    """What is wrong with the files of a step, one line each with the file's name; [] without checksums.

    Args:
      step: folder of the checkpoint.
      process: names and sizes are compared by every process, contents only of its share of the files.
      processes: how many share the reading.
    """
    try:
        recorded = _recorded(step)
    except _Unreadable as error:
        return [str(error)]
    if recorded is None:
        return []
    found = {name: size for name, size in files.files(step).items() if not _is_checksums(name)}
    wrong = [f"{name} is missing" for name in sorted(recorded.keys() - found.keys())]
    wrong += [f"{name} is not one of its files" for name in sorted(found.keys() - recorded.keys())]
    same_size = []
    for name in sorted(recorded.keys() & found.keys()):
        if found[name] == recorded[name]["bytes"]:
            same_size.append(name)
        else:
            wrong.append(f"{name} has {found[name]:,} bytes instead of {recorded[name]['bytes']:,}")

    def compare(name: str) -> str | None:
        try:
            same = _digest(step / name) == recorded[name][_ALGORITHM]
        except PermissionError:
            raise
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if same else f"{name} has other contents than were saved (its {_ALGORITHM} differs)"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return wrong + [line for line in pool.map(compare, same_size[process::processes]) if line]
