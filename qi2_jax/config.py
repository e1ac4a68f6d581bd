"""Experiment configs: Python files with `get_config(form)`, changed from the command line and checked."""

import argparse
import ast
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections

from data_pipeline.atomic import write_json_atomic


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name an experiment and change it."""
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a file such as experiments/demo.py, or experiments/demo.py:tiny"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes, such as transformer.train.steps=100"
    )


def set_platform(config: Any, meshes: Sequence[Any], processes: int = 1) -> None:
    """For `config.platform == "cpu"`, makes JAX see as many CPU devices as the largest mesh needs of each process.

    Must run before JAX is first used. On accelerators (`config.platform == ""`) nothing is changed.

    Raises:
      ValueError: for another platform, or if the processes cannot share the devices.
    """
    if config.platform not in ("", "cpu"):
        raise ValueError(
            f"platform is {config.platform!r}; choose 'cpu', or '' for what JAX finds, which JAX_PLATFORMS may narrow"
        )
    if config.platform == "cpu":
        import jax

        devices = max(mesh.data * mesh.fsdp * mesh.tensor for mesh in meshes)
        if devices < 1:
            raise ValueError(f"the meshes {[to_dict(mesh) for mesh in meshes]} have no devices; sizes are at least 1")
        if devices % processes:
            raise ValueError(f"{processes} processes cannot share the {devices} devices of the mesh evenly")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // processes)


def set_compilation_cache(config: Any, out: pathlib.Path) -> None:
    """Lets compiled programs be kept from one start to the next, where `config.compilation_cache` names a place."""
    import jax

    if place := config.get("compilation_cache", ""):
        jax.config.update("jax_compilation_cache_dir", place if "://" in place else str(out.absolute() / place))


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
