"""The files in a folder of checkpoints, from names and JSON alone. This module does not import JAX.

STEP/                a complete checkpoint; Orbax renames a save to its number once everything is on the disk
STEP/manifest.json   config, metrics and program, as the training loop recorded them
STEP/checksums-*.json   see `qi2_jax.training.checkpoints.checksums`; without them a checkpoint is "unverified"
STEP.keep            a mark: this checkpoint is never deleted
STEP.damaged         a damaged checkpoint that was set aside
STEP.deleted         a checkpoint whose deletion was interrupted, perhaps before its mark was checked
"""

import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from qi2_jax.runtime.atomic import write_json_atomic

MANIFEST = "manifest.json"
_KEEP, _DAMAGED, _DELETED, _UNFINISHED = ".keep", ".damaged", ".deleted", ".orbax-checkpoint-tmp"
_ORBAX = "_CHECKPOINT_METADATA"  # JSON; Orbax commits it with the arrays


def steps(directory: pathlib.Path) -> list[int]:
    """Complete steps in a checkpoint directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def plain(value: Any) -> Any:
    """Converts a manifest to JSON types: scalars of NumPy and JAX to numbers, values that are not finite to None.

    Raises:
      ValueError: naming a value that JSON cannot represent.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "dtype") and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"a manifest contains {value!r} ({type(value).__name__}), which JSON cannot represent")


def write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the readable copy of a step's manifest. If it is missing, the copy that Orbax committed is read."""
    write_json_atomic(path / MANIFEST, manifest)


def manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a step; {} for checkpoints of older versions, which have none.

    Raises:
      ValueError: if the file is damaged, naming it.
    """
    for name, key in ((MANIFEST, None), (_ORBAX, "custom_metadata")):
        if (path / name).is_file():
            try:
                found = json.loads((path / name).read_bytes())
                found = found if key is None else found.get(key) or {}
                if isinstance(found, dict):
                    return found
                reason = "not a JSON object"
            except (ValueError, AttributeError) as error:
                reason = str(error)
            raise ValueError(f"{path / name} is damaged ({reason}); `qi2 checkpoints --verify` checks all files")
    return {}


def metric(path: pathlib.Path, name: str) -> float | None:
    """A metric in a step's manifest; None if it is missing or not finite."""
    try:
        found = manifest(path).get("metrics") or {}
    except ValueError:
        return None
    value = found.get(name) if isinstance(found, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def saved_at(path: pathlib.Path) -> float:
    """The time at which a step was committed, in seconds since 1970; the folder's date if Orbax did not record it."""
    try:
        return json.loads((path / _ORBAX).read_bytes())["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def files(path: pathlib.Path) -> dict[str, int]:
    """{name within the step: bytes} of all files of a step, sorted."""
    found = (file for file in path.rglob("*") if not file.name.endswith(".partial") and file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(found)}


def marked(directory: pathlib.Path) -> set[int]:
    """Steps that are marked as never to be deleted."""
    names = [path.name.removesuffix(_KEEP) for path in directory.glob(f"*{_KEEP}")]
    return {int(name) for name in names if name.isdecimal()}


def keep(directory: pathlib.Path, step: int) -> None:
    """Marks a step as never to be deleted, also while a run trains in the folder.

    Raises:
      ValueError: if there is no such step, or it was just deleted.
    """
    mark = directory / f"{step}{_KEEP}"
    existed = mark.exists()
    if (directory / str(step)).is_dir():
        mark.touch()
    if not (directory / str(step)).is_dir():  # checked after marking, as `remove` checks marks after renaming
        if not existed:
            mark.unlink(missing_ok=True)
        raise ValueError(f"{directory} has no checkpoint of step {step}, only {steps(directory)}")


def unkeep(directory: pathlib.Path, step: int) -> None:
    """Removes a mark. The next save may delete the checkpoint.

    Raises:
      ValueError: if the step is not marked.
    """
    mark = directory / f"{step}{_KEEP}"
    if not mark.exists():
        raise ValueError(f"step {step} of {directory} is not marked; marked are {sorted(marked(directory))}")
    mark.unlink()


def remove(directory: pathlib.Path, step: int) -> bool:
    """Deletes a step unless it is marked. A kill at any moment leaves it intact or absent from `steps`."""
    path, doomed = directory / str(step), directory / f"{step}{_DELETED}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    if step in marked(directory):  # it was just marked
        os.rename(doomed, path)
        return False
    shutil.rmtree(doomed)
    return True


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a damaged step to `STEP.damaged`, so that the step can be saved again. Nothing is deleted."""
    for number in range(1, 1000):
        target = directory / f"{step}{_DAMAGED}{'' if number == 1 else f'-{number}'}"
        if not target.exists():
            break
    os.rename(directory / str(step), target)
    return target


def damaged(directory: pathlib.Path) -> list[str]:
    """Names of the damaged checkpoints that were set aside."""
    return sorted(path.name for path in directory.glob(f"*{_DAMAGED}*") if path.name.split(".")[0].isdecimal())


def unfinished_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """The folder in which a step is written until it is complete. `clean` deletes it if that never happens."""
    return directory / f"{step}{_UNFINISHED}"


def unfinished(directory: pathlib.Path, step: int | None = None) -> list[pathlib.Path]:
    """Folders of unfinished saves and deletions, of one step or of all. Those in progress look the same."""
    number = "[0-9]+" if step is None else str(step)
    pattern = re.compile(rf"{number}({re.escape(_DELETED)}|{re.escape(_UNFINISHED)}.*)")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))


def clean(directory: pathlib.Path) -> list[str]:
    """Deletes what killed processes left, and returns the names. Only the process that saves here may call it.

    A marked step whose deletion had begun gets its name back: `remove` was killed before it checked the mark.
    """
    left, kept = [], marked(directory)
    for path in unfinished(directory):
        whole = directory / path.name.removesuffix(_DELETED)
        if whole.name.isdecimal() and int(whole.name) in kept and not whole.exists():
            os.rename(path, whole)
        else:
            shutil.rmtree(path)
            left.append(path.name)
    for temporary in directory.glob("*/.*.partial"):  # unfinished manifests and checksums
        temporary.unlink(missing_ok=True)
    return left
