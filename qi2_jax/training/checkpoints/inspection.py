"""Listing, contents and verification of a run's checkpoints."""

import datetime
import pathlib
from typing import Any

from qi2_jax.config.changes import differences
from qi2_jax.config.parsing import config_fields, parse
from qi2_jax.training.checkpoints import checksums, files, retention

METRICS = ("loss", "validation_loss")

_ATTEMPTS = 5


def listing(directory: pathlib.Path) -> dict[str, Any]:
    """The complete checkpoints of a folder, ascending, and the names of damaged ones set aside, as plain JSON."""
    for _ in range(_ATTEMPTS):
        try:
            return _listing(directory)
        except FileNotFoundError:  # a run that trains in the folder has just deleted a checkpoint
            continue
    return _listing(directory)


def _listing(directory: pathlib.Path) -> dict[str, Any]:
    steps = files.steps(directory)
    policy = _policy(directory, steps)
    why = retention.reasons(directory, policy) if policy else {}
    marked = files.marked(directory)
    listed = []
    for step in steps:
        path = directory / str(step)
        listed.append(
            {
                "step": step,
                "saved": datetime.datetime.fromtimestamp(files.saved_at(path), datetime.UTC).isoformat("T", "seconds"),
                "bytes": sum(files.files(path).values()),
                "metrics": {name: files.metric(path, name) for name in METRICS},
                "marked": step in marked,
                "kept": why.get(step, ["marked"] if step in marked else []),
                "verified": checksums.is_verified(path),
            }
        )
    return {"checkpoints": listed, "damaged": files.damaged(directory)}


def _policy(directory: pathlib.Path, steps: list[int]) -> retention.Policy | None:
    """The retention policy in the newest manifest; None if it has none."""
    try:
        group = files.manifest(directory / str(steps[-1]))["config"]["checkpoint"]
        known = {field.name: group[field.name] for field in config_fields(retention.Policy) if field.name in group}
        return parse(retention.Policy, known)
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def inspect(directory: pathlib.Path, step: int) -> dict[str, Any]:
    """The items of a step with leaves, parameters, bytes and dtypes; its manifest; and changes of the config.

    Raises:
      ValueError: if there is no such step.
    """
    _check(directory, [step])
    import jax

    from qi2_jax.training.checkpoints import contents

    jax.config.update("jax_platforms", "cpu")  # Orbax needs devices, and those of a TPU belong to the run

    path = directory / str(step)
    items = {}
    for item, leaves in contents.contents(path).items():
        items[item] = {
            "leaves": len(leaves),
            "parameters": sum(leaf.size for leaf in leaves.values()),
            "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()),
            "dtypes": sorted({str(leaf.dtype) for leaf in leaves.values()}),
        }
    manifest = files.manifest(path)
    before = [other for other in files.steps(directory) if other < step]
    changes = None
    if before and "config" in manifest:
        earlier = files.manifest(directory / str(before[-1])).get("config")
        changes = None if earlier is None else list(map(str, differences(earlier, manifest["config"])))
    return {
        "step": step,
        "items": items,
        "manifest": manifest,
        "compared_to": before[-1] if before else None,
        "config_changes": changes,
        "verified": checksums.is_verified(path),
    }


def verify(directory: pathlib.Path, steps: list[int]) -> dict[int, list[str] | None]:
    """Problems with the files of each step: an empty list if there are none, None if there are no checksums.

    Steps that a run deletes meanwhile are left out.

    Args:
      directory: folder of checkpoints.
      steps: steps to verify; empty for all.

    Raises:
      ValueError: if a step does not exist.
    """
    _check(directory, steps)
    found: dict[int, list[str] | None] = {}
    for step in steps or files.steps(directory):
        path = directory / str(step)
        try:
            wrong = checksums.problems(path)
            verified = checksums.is_verified(path)
        except FileNotFoundError:
            if path.is_dir():
                raise
        if path.is_dir():
            found[step] = wrong if wrong or verified else None
    return found


def _check(directory: pathlib.Path, steps: list[int]) -> None:
    if unknown := sorted(set(steps) - set(files.steps(directory))):
        raise ValueError(f"{directory} has no checkpoints of the steps {unknown}, only {files.steps(directory)}")
