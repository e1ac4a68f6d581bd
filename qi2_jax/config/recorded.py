"""The config a folder was created with: recording it, and comparing it with the config of a later call."""

import json
import pathlib
from typing import Any

from qi2_jax.runtime.atomic import write_json_atomic


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain config -> {dotted key: value}."""
    result = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per dotted key whose value differs between two plain configs."""
    a, b = flat(old), flat(new)
    missing = object()
    return [
        f"{key}: {a.get(key, 'absent')!r} -> {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def claimed(path: pathlib.Path) -> dict[str, Any]:
    """What `claim` recorded; raises a ValueError if the file is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        values, reason = None, str(error)
    else:
        reason = "it holds no JSON object"
    if isinstance(values, dict):
        return values
    raise ValueError(
        f"{path} is damaged: {reason}. Bring it back from a copy; or delete it, and the folder goes on with what is "
        "asked for now, which must be what it was begun with"
    )


def changes(path: pathlib.Path, values: dict[str, Any]) -> list[str]:
    """How values differ from those recorded for a folder, as `difference`; nothing where none are recorded."""
    return difference(claimed(path), json.loads(json.dumps(values))) if path.exists() else []


def claim(
    path: pathlib.Path, values: dict[str, Any], may_change: tuple[str, ...] = (), *, write: bool = True, more: str = ""
) -> list[str]:
    """Records what a folder is made with, or checks that it is continued with the same.

    Args:
      path: the JSON file in that folder.
      values: plain JSON values.
      may_change: beginnings of the dotted keys that another call may change.
      write: False in all but one of several processes.
      more: another way out of a refusal, for its message.

    Returns:
      One line per key that changed, as `difference` gives them.

    Raises:
      ValueError: if the folder was made with other values, naming each; or if the file is damaged.
    """
    found = changes(path, values)
    if refused := [line for line in found if not line.startswith(may_change)]:
        raise ValueError(
            f"{path.parent} was begun with other values; go on with those, or choose another folder{more}. "
            "What changed:\n  " + "\n  ".join(refused)
        )
    if write:
        write_json_atomic(path, values)
    return found
