"""Files from outside, read with limits, and folders of ours, which are either complete or visibly unfinished."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from qi2_jax.runtime.atomic import write_atomic

MAX_JSON_BYTES = 1 << 20
UNFINISHED = "qi2.unfinished"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of at most `MAX_JSON_BYTES`.

    Raises:
      ValueError: naming the file, if it is missing, larger, or not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that it can need")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} where an object is needed")
    return values


def write(path: pathlib.Path, data: bytes) -> None:
    """Writes a small file whole, and to the disk itself: what is written later cannot survive a crash without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object as `write` does."""
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def check_links(folder: pathlib.Path) -> None:
    """Raises a ValueError that lists every link in `folder` that leads out of it, or that stands for a folder.

    A snapshot in a Hugging Face cache consists of links to the `blobs` beside the snapshots; they count as inside.
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
            f"{folder} holds links to folders or to files outside of it: {sorted(leaving)}. If you trust what they "
            f"point to, make a copy without links, cp -rL {folder} COPY, and take that"
        )


@contextlib.contextmanager
def building(out: pathlib.Path, nbytes: int) -> Iterator[None]:
    """Makes the folder `out`, which carries `UNFINISHED` while the body fills it with about `nbytes`.

    If the body fails, the folder is removed; after a kill, the next attempt removes what is left and starts again.

    Raises:
      ValueError: if `out` is neither missing, nor empty, nor such a remainder, or its disk has no room for it.
    """
    if (out / UNFINISHED).is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; choose another --out")
    disk = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(disk).free) < nbytes:
        raise ValueError(
            f"{out} needs {nbytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left; free some, or choose an --out "
            "on another disk"
        )
    write(out / UNFINISHED, b"This folder is incomplete: it is being written, or that was interrupted.\n")
    try:
        yield
    except BaseException:
        shutil.rmtree(out)
        raise
    (out / UNFINISHED).unlink()
