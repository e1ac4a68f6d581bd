"""Experiment configs: Python files with `get_config(form)`, changed from the command line and checked."""

import ast
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections


def load(name: str, overrides: Sequence[str] = ()) -> ml_collections.FrozenConfigDict:
    """Loads `path/to/file.py` or `path/to/file.py:form` and applies overrides such as `optimizer.lr=1e-4`.

    Args:
      name: an experiment file, with an optional form (for instance `tiny`) that is passed to its `get_config`.
      overrides: `key.path=value`; values are Python literals, anything else is taken as a string.

    Raises:
      ValueError: if the file is missing or has no `get_config`, for a form it refuses, for an unknown key (with the
        keys that exist beside it), or for a value of another type than the config's.
    """
    file, _, form = name.partition(":")
    path = pathlib.Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"experiment {file!r} is no Python file; see experiments/")
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


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fits(value: Any, held: Any) -> bool:
    """Whether a value may stand where `held` does: its type, for tuples that of its items."""
    if isinstance(held, (tuple, list)):
        return isinstance(value, (tuple, list)) and all(not held or _fits(item, held[0]) for item in value)
    if isinstance(held, bool) or isinstance(value, bool):
        return isinstance(held, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(held, float) else type(held))


def _set(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *parents, last = key.split(".")
    node = config
    for part in [*parents, last]:
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
            raise ValueError(f"config has no key {key!r}: {part!r} is not one of {known}")
        node, parent = node[part], node
    held = parent[last]
    if isinstance(held, ml_collections.ConfigDict):
        raise ValueError(f"config key {key!r} is a group; change its keys {sorted(held)} one by one")
    value = _value(text)
    if isinstance(held, str) and not isinstance(value, str):
        value = text  # a folder may be named 123
    if not _fits(value, held) or (isinstance(value, int) and value.bit_length() > 63):
        hint = "; write a tuple of one as ('x',)" if isinstance(held, (tuple, list)) else ""
        raise ValueError(f"config key {key!r} holds {held!r} ({type(held).__name__}), it cannot become {value!r}{hint}")
    if isinstance(held, (tuple, list)):
        value = map(_tuples, value)
    parent[last] = float(value) if isinstance(held, float) else type(held)(value)


def _tuples(value: Any) -> Any:
    """Lists within a value as tuples, which a frozen config holds."""
    return tuple(map(_tuples, value)) if isinstance(value, (tuple, list)) else value


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types, tuples as lists."""

    def plain(value):
        if isinstance(value, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict, dict)):
            return {key: plain(value[key]) for key in value}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(config)


def dataclass_fields(config: Any) -> dict[str, Any]:
    """A config node as keyword arguments of a frozen dataclass: lists become tuples, which are hashable."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in to_dict(config).items()}
