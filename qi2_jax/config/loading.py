"""Experiment files: Python files with `get_config(form)`, whose values can be overridden from the command line."""

import ast
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from qi2_jax.config import parsing

MAX_BITS = 63  # of an integer


def load(name: str, overrides: Sequence[str] = ()) -> ml_collections.FrozenConfigDict:
    """Loads an experiment and applies overrides.

    Args:
      name: path of an experiment file, with an optional form that is passed to its `get_config`: `demo.py:tiny`.
      overrides: changes such as `optimizer.lr=1e-4`; a value that is not a Python literal is taken as a string.

    Raises:
      ValueError: if the file is missing or has no `get_config`, for a form that it refuses, for an unknown key, or for
        a value whose type differs from the config's.
    """
    file, _, form = name.partition(":")
    path = pathlib.Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"experiment {file!r} is not a Python file; see experiments/")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"experiment {file!r} has no function get_config(form)")
    config = ml_collections.ConfigDict(module.get_config(form))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must look like key.path=value")
        _set(config, key, text)
    return ml_collections.FrozenConfigDict(config)


def to_dict(config: Any) -> Any:
    """A config, or a value of one, as plain JSON types: groups as dicts, tuples as lists."""
    if isinstance(config, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict)):
        return {key: to_dict(config[key]) for key in config}
    return [to_dict(item) for item in config] if isinstance(config, (list, tuple)) else config


def _set(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *parents, last = key.split(".")
    node = config
    for part in [*parents, last]:
        known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
        if part not in known:
            raise parsing.unknown_key(key, part, known)
        node, parent = node[part], node
    current = parent[last]
    if isinstance(current, ml_collections.ConfigDict):
        raise ValueError(f"config key {key!r} is a group; change its keys one by one: {', '.join(sorted(current))}")
    value = _literal(text)
    if isinstance(current, str) and not isinstance(value, str):
        value = text  # a folder may be named 123
    if not _has_type_of(value, current) or (isinstance(value, int) and value.bit_length() > MAX_BITS):
        hint = "; write a tuple with one item as ('x',)" if isinstance(current, (tuple, list)) else ""
        raise ValueError(
            f"config key {key!r} has the value {current!r} ({type(current).__name__}); it cannot become {value!r}{hint}"
        )
    if isinstance(current, (tuple, list)):
        value = map(_as_tuples, value)
    parent[last] = float(value) if isinstance(current, float) else type(current)(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _has_type_of(value: Any, current: Any) -> bool:
    """Whether a value may replace the current one: it has the same type, and so have the items of a tuple."""
    if isinstance(current, (tuple, list)):
        return isinstance(value, (tuple, list)) and all(not current or _has_type_of(item, current[0]) for item in value)
    if isinstance(current, bool) or isinstance(value, bool):
        return isinstance(current, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(current, float) else type(current))


def _as_tuples(value: Any) -> Any:
    """The lists within a value as tuples, because a frozen config cannot contain lists."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (tuple, list)) else value
