"""The config that a folder was created with: recording it, and comparing it with the config of a later call."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from qi2_jax.config.changes import Change, differences, means_default
from qi2_jax.runtime.atomic import write_json_atomic

# For messages of commands that take this option.
ACCEPT_HINT = ", or accept the new values with --accept-changes, where the command has it"


def read(path: pathlib.Path) -> dict[str, Any]:
    """The recorded config. Raises a ValueError if the file is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        values, reason = None, str(error)
    else:
        reason = "it does not contain a JSON object"
    if isinstance(values, dict):
        return values
    raise ValueError(
        f"{path} is damaged: {reason}. Restore it from a copy; or delete it and rerun with the config that the folder "
        "was created with, which is then recorded again"
    )


def changes_since(path: pathlib.Path, values: dict[str, Any]) -> list[Change]:
    """How values differ from the recorded config; empty if nothing is recorded."""
    return differences(read(path), json.loads(json.dumps(values))) if path.exists() else []


def claim(
    path: pathlib.Path,
    values: dict[str, Any],
    may_change: Callable[[str], bool] = lambda key: False,
    *,
    cls: Any = None,
    write: bool = True,
    hint: str = "",
) -> list[Change]:
    """Records the config of a new folder, or checks that an existing folder continues with the same one.

    Args:
      path: JSON file in the folder.
      values: config as plain JSON types.
      may_change: whether the key of that path may differ from the recorded config.
      cls: dataclass of the config; a key that only the new config has, with its default, is then no change.
      write: whether to record the config; true in one process only.
      hint: another way out, which ends the message of a refusal.

    Returns:
      The changes, all of which are allowed.

    Raises:
      ValueError: if keys differ that may not, naming each of them; or if the file is damaged.
    """
    found = [change for change in changes_since(path, values) if cls is None or not means_default(cls, change)]
    if refused := [change for change in found if not may_change(change.key)]:
        raise ValueError(
            f"{path.parent} was created with a different config; rerun with the original values, or choose another "
            f"folder{hint}. What changed:\n  " + "\n  ".join(map(str, refused))
        )
    if write:
        write_json_atomic(path, values)
    return found
