"""Pickles of nested dicts of NumPy arrays, read without running anything that they name.

A pickle is a program: its opcodes call any function by name. The unpickler here calls none. The three names with which
NumPy pickles an array stand for recorders, and every other name is refused. What was recorded is then checked, and the
array is taken from its bytes.
"""

import io
import math
import pickle
from typing import Any

import numpy as np

RECONSTRUCT, ARRAY, DTYPE = "reconstruct", "array", "dtype"
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy", "ndarray"): ARRAY,
    ("numpy", "dtype"): DTYPE,
}
CODE = "f4"
DTYPE_STATE = (3, "<", None, None, None, -1, -1, 0)  # little-endian, without fields


class _Recorded:
    """A call in a pickle and the state that follows it; neither is carried out."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple):
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """A name in a pickle; calling it records the call."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *arguments: Any) -> _Recorded:
        return _Recorded(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what it names")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _Name(_NAMES[module, name])


def loads(data: bytes, where: str) -> dict[str, Any]:
    """Reads a pickle of nested dicts of little-endian float32 arrays.

    Args:
      data: the pickle.
      where: name of the file in errors.

    Raises:
      ValueError: if the pickle contains anything else.
    """
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    # A broken pickle raises errors of many types.
    except Exception as error:
        raise ValueError(f"{where} is not a pickle of arrays: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} contains a {type(found).__name__} where a dict of arrays is needed")
    return _arrays(found, where, depth=0)


def _arrays(found: dict, where: str, depth: int) -> dict[str, Any]:
    if depth > 8:  # a dict may contain itself
        raise ValueError(f"{where} nests dicts too deeply")
    result: dict[str, Any] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise ValueError(f"{where} has the key {name!r} where a name is needed")
        nested = isinstance(value, dict)
        result[name] = _arrays(value, where, depth + 1) if nested else _array(value, f"{where}: {name}")
    return result


def _array(value: Any, where: str) -> np.ndarray:
    """The array that NumPy would have built: state is (version, shape, dtype, Fortran order, bytes)."""
    state = value.state if isinstance(value, _Recorded) and value.name == RECONSTRUCT else None
    if not (isinstance(state, tuple) and len(state) == 5):
        raise ValueError(f"{where} is not an array")
    _, shape, kind, is_fortran, data = state
    is_known = isinstance(kind, _Recorded) and kind.name == DTYPE and kind.state == DTYPE_STATE
    if not is_known or kind.arguments[:1] != (CODE,):
        raise ValueError(f"{where} has another dtype than little-endian {CODE}")
    is_shape = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not is_shape or is_fortran is not False or not isinstance(data, bytes):
        raise ValueError(f"{where} is not an array in C order with its bytes")
    if len(data) != math.prod(shape) * 4:
        raise ValueError(f"{where} has {len(data)} bytes for the shape {shape}")
    return np.frombuffer(data, "<f4").reshape(shape)
