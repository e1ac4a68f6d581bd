"""What lies in a folder of checkpoints, told from names and JSON alone: importable without JAX.

STEP/                a complete checkpoint: Orbax renames a save to its number when everything is on the disk
STEP/manifest.json   what the loop says about it
STEP/checksums-*.json   see `qi2_jax.training.checkpoints.checksums`; without them a checkpoint is "unverified"
STEP.keep            a mark: this checkpoint is never deleted
STEP.damaged         a checkpoint that was found damaged, set aside
STEP.deleted         one whose deletion was interrupted; with a mark, before it was known whether it may be deleted
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
    """A manifest in JSON's types: scalars of NumPy and JAX as numbers, what is not finite as None.

    Raises:
      ValueError: for anything that JSON does not know, naming it.
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
    raise ValueError(f"a manifest holds {value!r} ({type(value).__name__}); it takes only what JSON knows")


def write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Puts the readable copy of a manifest into a step; the one that Orbax committed counts where it is missing."""
    write_json_atomic(path / MANIFEST, manifest)


def manifest(path: pathlib.Path) -> dict[str, Any]:
    """What the loop said about a step; {} for checkpoints of older versions, which have none.

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
                reason = "no JSON object"
            except (ValueError, AttributeError) as error:
                reason = str(error)
            raise ValueError(f"{path / name} is damaged ({reason}); `qi2 checkpoints --verify` looks at all files")
    return {}


def metric(path: pathlib.Path, name: str) -> float | None:
    """A metric of a step's manifest; None where it has none or it was not finite."""
    try:
        found = manifest(path).get("metrics") or {}
    except ValueError:
        return None
    value = found.get(name) if isinstance(found, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def saved_at(path: pathlib.Path) -> float:
    """When a step was committed, in seconds since 1970; by the folder's date where Orbax does not say."""
    try:
        return json.loads((path / _ORBAX).read_bytes())["commit_timestamp_nsecs"] / 1e9
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def files(path: pathlib.Path) -> dict[str, int]:
    """Bytes of every file of a step by its name within the step, sorted."""
    found = (file for file in path.rglob("*") if not file.name.endswith(".partial") and file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(found)}


def marked(directory: pathlib.Path) -> set[int]:
    """Steps that are marked to be kept for ever."""
    names = [path.name.removesuffix(_KEEP) for path in directory.glob(f"*{_KEEP}")]
    return {int(name) for name in names if name.isdecimal()}


def keep(directory: pathlib.Path, step: int) -> None:
    """Marks a step to be kept for ever, also while a run trains in the folder.

    Raises:
      ValueError: if there is no such step, or it was deleted this moment.
    """
    mark = directory / f"{step}{_KEEP}"
    existed = mark.exists()
    if (directory / str(step)).is_dir():
        mark.touch()
    if not (directory / str(step)).is_dir():  # looked at after marking: `remove` looks at marks after renaming
        if not existed:
            mark.unlink(missing_ok=True)
        raise ValueError(f"{directory} has no checkpoint of step {step}, only {steps(directory)}")


def unkeep(directory: pathlib.Path, step: int) -> None:
    """Takes a mark away; the next save may delete the checkpoint.

    Raises:
      ValueError: if the step is not marked.
    """
    mark = directory / f"{step}{_KEEP}"
    if not mark.exists():
        raise ValueError(f"step {step} of {directory} is not marked; marked are {sorted(marked(directory))}")
    mark.unlink()


def remove(directory: pathlib.Path, step: int) -> bool:
    """Deletes a step unless it is marked. A kill at any moment leaves it whole, or gone from `steps`."""
    path, doomed = directory / str(step), directory / f"{step}{_DELETED}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    if step in marked(directory):  # marked a moment ago
        os.rename(doomed, path)
        return False
    shutil.rmtree(doomed)
    return True


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a damaged step to `STEP.damaged`, so that the step can be saved again; nothing is deleted."""
    for number in range(1, 1000):
        target = directory / f"{step}{_DAMAGED}{'' if number == 1 else f'-{number}'}"
        if not target.exists():
            break
    os.rename(directory / str(step), target)
    return target


def aside(directory: pathlib.Path) -> list[str]:
    """Names of the damaged checkpoints that were set aside."""
    return sorted(path.name for path in directory.glob(f"*{_DAMAGED}*") if path.name.split(".")[0].isdecimal())


def unfinished_path(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Where a step is written before it is complete: what `clean` deletes if that never happens."""
    return directory / f"{step}{_UNFINISHED}"


def unfinished(directory: pathlib.Path, step: int | None = None) -> list[pathlib.Path]:
    """What saves and deletions that did not end have left, of one step or of all. Those under way look the same."""
    number = "[0-9]+" if step is None else str(step)
    pattern = re.compile(rf"{number}({re.escape(_DELETED)}|{re.escape(_UNFINISHED)}.*)")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))


def clean(directory: pathlib.Path) -> list[str]:
    """Deletes what killed processes left and returns its names. Only for the one process that saves here.

    A marked step whose deletion had begun gets its name back: `remove` was killed before it looked at marks.
    """
    left, kept = [], marked(directory)
    for path in unfinished(directory):
        whole = directory / path.name.removesuffix(_DELETED)
        if whole.name.isdecimal() and int(whole.name) in kept and not whole.exists():
            os.rename(path, whole)
        else:
            shutil.rmtree(path)
            left.append(path.name)
    for temporary in directory.glob("*/.*.partial"):  # of a manifest or checksums
        temporary.unlink(missing_ok=True)
    return left
