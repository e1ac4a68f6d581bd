"""Turns the nested keys of an experiment config into frozen dataclasses.

The fields of a dataclass are the keys of its group. A field with a default may be missing from the config, any other
may not. Values must have the field's type. The dataclass checks its ranges in `__post_init__`. Messages
name the full path of a key, such as `transformer.optimizer.lr`.
"""

import collections.abc
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from qi2_jax.config import fields

Config = TypeVar("Config")

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def parse(cls: type[Config], values: Any, path: str = "") -> Config:
    """An instance of a dataclass from a group of a config.

    Args:
      cls: dataclass whose fields are the keys of the group.
      values: keys of the group as plain JSON types; sequences may be tuples too.
      path: key of the group within the whole config, for messages; "" for the whole config.

    Raises:
      ValueError: for an unknown or missing key, a value of another type, or a value that the dataclass refuses.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} is {values!r}; it must be a group of keys")
    declared = {field.name: field for field in config_fields(cls)}
    arguments = {
        name: entry
        for field in declared.values()
        for name, entry in (fields.choices_of(field) or {}).items()
        if dataclasses.is_dataclass(entry)
    }
    if unknown := sorted(set(values) - set(declared) - set(arguments)):
        raise unknown_key(joined(path, unknown[0]), unknown[0], [*declared, *arguments])
    parsed = {}
    for name, field in declared.items():
        if name in values:
            parsed[name] = _value(_types(cls)[name], field, values, joined(path, name))
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing config key {joined(path, name)!r}")
    for name in set(arguments) & set(values):  # arguments of entries that are not chosen are checked too
        parse(arguments[name], values[name], joined(path, name))  # type: ignore[arg-type]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if fields.is_as_typed(field):
            parsed[field.name] = dict(values)
    return _constructed(cls, parsed, path)


def unknown_key(path: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a key that does not exist, with the closest known key.

    Args:
      path: whole key as it was typed.
      name: part of the path that is unknown.
      known: keys of the group in which the name was looked up.
    """
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known)) or 'none'}"
    return ValueError(f"unknown config key {path!r}; {hint}")


def joined(path: str, name: str) -> str:
    """The path of a key within a group."""
    return f"{path}.{name}" if path else name


def config_fields(cls: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that are keys of its group."""
    return [field for field in dataclasses.fields(cls) if field.init and not fields.is_as_typed(field)]


def below(cls: Any, name: str) -> Any:
    """The dataclass of a group's key, or its type if it is no dataclass; None if the key does not exist.

    Args:
      cls: dataclass of a group, or the mapping type of a group whose keys are free, such as `Mapping[str, Stage]`.
    """
    if typing.get_origin(cls) in (dict, collections.abc.Mapping):
        return typing.get_args(cls)[1]
    return _types(cls).get(name) if dataclasses.is_dataclass(cls) else None


def _types(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(expected: Any, field: dataclasses.Field, values: Mapping[str, Any], path: str) -> Any:
    table = fields.choices_of(field)
    if table is None:
        return _converted(expected, values[field.name], path)
    name = values[field.name]
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{path} is {name!r}; choose one of {sorted(table)}")
    if not dataclasses.is_dataclass(table[name]):
        return table[name]
    group = path.rpartition(".")[0]
    return parse(table[name], values.get(name, {}), joined(group, name))  # type: ignore[arg-type]


def _converted(expected: Any, value: Any, path: str) -> Any:
    """The value as the type that a field declares."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected):
        return parse(expected, value, path)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):  # only with None
        (other,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _converted(other, value, path)
    if origin is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} is {value!r}; it must be a group of keys")
        return {name: _converted(arguments[1], item, joined(path, name)) for name, item in value.items()}
    if origin is tuple:
        return _as_tuple(arguments, value, path)
    if expected is float and type(value) in (int, float):
        return float(value)
    if type(value) is not expected:
        raise ValueError(f"{path} is {value!r}; it must be {_NAMES.get(expected, expected)}")
    return value


def _as_tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path} is {value!r}; it must be a tuple, which has a comma after a single item: (x,)")
    if items[-1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise ValueError(f"{path} is {tuple(value)}; it must have {len(items)} items")
    return tuple(
        _converted(expected, item, f"{path}[{place}]")
        for place, (expected, item) in enumerate(zip(items, value, strict=True))
    )


def _constructed(cls: type[Config], parsed: dict[str, Any], path: str) -> Config:
    """The dataclass, or its error with the path in front, which completes a key that the error begins with."""
    try:
        return cls(**parsed)
    except ValueError as error:
        first = re.split(r"[ .\[]", str(error), maxsplit=1)[0]
        raise ValueError(f"{path}{'.' if first in parsed else ': '}{error}" if path else str(error)) from None
