"""Checksums of a checkpoint's files, written by all processes after a save and compared before a restore.

Every process hashes its share of the files into `STEP/checksums-PROCESS.json`. The file of process 0 also lists all
files. On a network file system a process may see an older listing than process 0 and miss files: the step then counts
as unverified.

The hash is BLAKE2b with 256 bits, as `b2sum -l 256` prints it. It runs at about 1 GB/s per thread on any 64-bit core,
where SHA-256 needs special instructions, and detects every flipped bit. hashlib releases the interpreter lock while it
hashes, so threads scale. This module does not import JAX.
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
    """A file of checksums that cannot be parsed."""


def _digest(path: pathlib.Path) -> str:
    return of_file(path, lambda: hashlib.blake2b(digest_size=32)).hex()


def _is_checksums(name: str) -> bool:
    return "/" not in name and name.startswith(_PREFIX)


def record(step: pathlib.Path, process: int = 0, processes: int = 1) -> None:
    """Hashes this process's share of the files of a complete step; process 0 adds the manifest.

    Args:
      step: folder of the checkpoint, which all processes see.
      process: index of this process.
      processes: number of processes.
    """
    names = [name for name in files.files(step) if not _is_checksums(name) and name != files.MANIFEST]
    share = names[process::processes]
    if process == 0 and (step / files.MANIFEST).is_file():
        share.append(files.MANIFEST)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(step / name), share)
        entries = {
            name: {"bytes": (step / name).stat().st_size, _ALGORITHM: digest}
            for name, digest in zip(share, digests, strict=True)
        }
    found: dict[str, Any] = {"process": process, "processes": processes, "files": entries}
    if process == 0:
        found["all_files"] = sorted({*names, *share})
    write_json_atomic(step / f"{_PREFIX}{process}.json", found)


def _recorded(step: pathlib.Path) -> dict[str, dict[str, Any]] | None:
    """{file: its size and hash} from the checksums of all processes.

    None if the checksums of a process are missing, or do not cover all files that process 0 listed. Older versions have
    no such list.
    """
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
    """Whether all `processes` processes have written their checksums, whatever they contain."""
    return all((step / f"{_PREFIX}{process}.json").is_file() for process in range(processes))


def is_verified(step: pathlib.Path) -> bool:
    """Whether a step has checksums of all its files. The files themselves are not read."""
    try:
        return _recorded(step) is not None
    except _Unreadable:
        return False


def problems(step: pathlib.Path, process: int = 0, processes: int = 1) -> list[str]:
    """A line for each damaged file of a step, with its name; empty for a step without checksums.

    Every process compares all names and sizes, but only the contents of its share of the files.

    Args:
      step: folder of the checkpoint.
      process: index of this process.
      processes: number of processes that share the reading.
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
