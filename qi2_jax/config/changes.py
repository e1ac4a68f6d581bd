"""Differences between two configs, and which of them a config's dataclasses allow when a run or job continues."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qi2_jax.config import fields, parsing


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()  # the value of a key that one of two configs does not have


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs between two configs.

    Attributes:
      key: path of the key, such as "train.steps".
      old, new: plain JSON values, or `ABSENT`.
    """

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys whose values differ between two configs of plain JSON types, sorted by key."""
    before, after = _flat(old), _flat(new)
    pairs = [(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted(before.keys() | after.keys())]
    return [Change(key, *values) for key, *values in pairs if values[0] != values[1]]


def is_within(key: str, group: str) -> bool:
    """Whether a key is the given one, or one below it."""
    return key == group or key.startswith(f"{group}.")


def is_changeable(cls: Any, key: str) -> bool:
    """Whether a config's dataclasses declare that a key may change, see `fields.changeable`.

    The outermost field of the path that declares anything decides. Keys that do not exist may not change.

    Args:
      cls: dataclass of the whole config.
      key: path of the key within it.
    """
    for name in key.split("."):
        if dataclasses.is_dataclass(cls):
            field = next((field for field in parsing.config_fields(cls) if field.name == name), None)
            if field is None:
                return False
            if (declared := fields.declares_changeable(field)) is not None:
                return declared
        cls = parsing.below(cls, name)
    return False


def means_default(cls: Any, change: Change) -> bool:
    """Whether the old config lacks the key, and the new value is the field's default.

    The default of a key that was added later stands for the earlier behaviour, so both configs mean the same.

    Args:
      cls: dataclass of the whole config.
      change: difference between two configs.
    """
    field = None
    for name in change.key.split("."):
        known = parsing.config_fields(cls) if dataclasses.is_dataclass(cls) else []
        field = next((field for field in known if field.name == name), None)
        cls = parsing.below(cls, name)
    if change.old is not ABSENT or field is None or fields.choices_of(field) is not None:
        return False
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return type(default) is type(change.new) and default == change.new


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested plain config -> {path of a key: value}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = parsing.joined(path, name)
        result.update(_flat(value, key) if isinstance(value, Mapping) else {key: value})
    return result
