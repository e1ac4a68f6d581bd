"""Files from outside, read with size limits, and output folders, which appear only when they are complete."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from qi2_jax.runtime.atomic import write_atomic
from qi2_jax.runtime.text_files import read_text

MAX_JSON_BYTES = 1 << 20
MAX_LISTED = 20  # names of a folder's contents in an error
UNFINISHED = "qi2.unfinished"  # the marker with which earlier versions wrote into the output folder itself
STAGING = ".qi2.partial"
LAST = ("qi2.json", "model_index.json")  # a folder without these is not taken for complete


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `MAX_JSON_BYTES`.

    Raises:
      ValueError: naming the file, if it is missing (then also what its folder contains), larger, or not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {contents(path.parent)}")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains a {type(values).__name__} where an object is needed")
    return values


def contents(folder: pathlib.Path) -> str:
    """A sentence about what a folder contains, for errors about what it lacks."""
    if not folder.is_dir():
        existing = next((parent for parent in folder.parents if parent.is_dir()), None)
        return f"the folder {folder} does not exist" + (f"; {contents(existing)}" if existing else "")
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if not names:
        return f"the folder {folder} is empty"
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"the folder {folder} contains {', '.join(names[:MAX_LISTED])}{more}"


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a small file atomically and flushes it to the disk, so that no later write can survive a crash alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object as `write` does."""
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def check_links(folder: pathlib.Path) -> None:
    """Raises a ValueError that lists every link in `folder` that leads out of it or points to a folder.

    A snapshot in a Hugging Face cache consists of links to the `blobs` beside the snapshots; those are allowed.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    leaving = []
    for parent, folders, files in os.walk(folder):
        for path in (pathlib.Path(parent, name) for name in (*folders, *files)):
            target = pathlib.Path(os.path.realpath(path))
            if path.is_symlink() and (target.is_dir() or not any(map(target.is_relative_to, inside))):
                leaving.append(f"{path.relative_to(folder)} -> {target}")
    if leaving:
        raise ValueError(
            f"{folder} contains links to folders or to files outside of it: {sorted(leaving)}. If you trust their "
            f"targets, copy the folder without links, cp -rL {folder} COPY, and use the copy"
        )


@contextlib.contextmanager
def building(out: pathlib.Path, nbytes: int) -> Iterator[pathlib.Path]:
    """Yields a temporary folder on the disk of `out`, whose content becomes that of `out` when the body succeeds.

    The temporary folder lies beside `out`, or in it if `out` exists as an empty folder. If the body fails, it is
    removed; after a kill, the next attempt removes it. Nothing incomplete appears in `out` itself.

    Args:
      out: folder to create; missing or empty.
      nbytes: approximate size of the content.

    Raises:
      ValueError: if `out` is a file, not empty or left incomplete by an earlier version, if another process is creating
        it, or if its disk has too little space.
    """
    out = out.absolute()
    if (out / UNFINISHED).is_file():
        raise ValueError(
            f"{out} is incomplete: an earlier version of qi2 was stopped while it wrote it, and left {UNFINISHED}. "
            f"Delete the folder (rm -r {out}) if nothing else is in it, or choose another --out"
        )
    existed = out.is_dir()
    staging = out / STAGING if existed else out.with_name(f".{out.name}{STAGING}")
    is_free = staging.is_dir() or not any(out.iterdir()) if existed else not (out.exists() or out.is_symlink())
    if not is_free:
        raise ValueError(f"{out} already exists and is not an empty folder; choose another --out")
    disk = next(parent for parent in (out, *out.parents) if parent.exists())
    if (free := shutil.disk_usage(disk).free) < nbytes:
        raise ValueError(
            f"{out} needs {nbytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left; free some, or choose an --out "
            "on another disk"
        )
    staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging, out):
        try:
            for folder in (staging, out) if existed else (staging,):  # leftovers of a killed attempt
                _clear(folder)
            yield staging
            if existed:
                for path in sorted(staging.iterdir(), key=lambda path: path.name in LAST):
                    path.rename(out / path.name)
                staging.rmdir()
            else:
                staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _clear(folder: pathlib.Path) -> None:
    for path in folder.iterdir():
        if path.name != STAGING:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _locked(staging: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a temporary folder, which the system releases when the process ends."""
    handle = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {out}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(handle)
