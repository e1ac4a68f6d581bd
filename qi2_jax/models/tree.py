"""Dotted names of the leaves of a tree, as used in files, reports and exchange with other frameworks."""

from typing import Any

import jax

_VALUE = "value"  # attribute of flax's `nnx.Param` with the array; not part of a name


def _part(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"unknown tree path entry {entry!r}")


def leaf_name(path: tuple) -> str:
    """Dotted name of a tree path, such as `blocks.attn.q.weight`; independent of the module library."""
    parts = [_part(entry) for entry in path]
    return ".".join(parts[:-1] if parts and parts[-1] == _VALUE else parts)


def to_dict(tree: Any) -> dict[str, Any]:
    """Flattens a tree (modules, optimizer states, dicts) into {dotted name: leaf}, in tree order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def from_dict(like: Any, leaves: dict[str, Any]) -> Any:
    """Puts named leaves back into the structure of `like`.

    Raises:
      ValueError: listing all missing and all unexpected leaves.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [leaf_name(path) for path, _ in flat]
    missing, unexpected = sorted(set(names) - set(leaves)), sorted(set(leaves) - set(names))
    if missing or unexpected:
        raise ValueError(f"leaves do not match the tree: missing {missing}, unexpected {unexpected}")
    return jax.tree_util.tree_unflatten(treedef, [leaves[name] for name in names])
