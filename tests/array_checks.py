"""Enforces the jaxtyping annotations of array functions in every test."""

import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# A Python int is a float, as in PEP 484.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Checks arguments and result of a function at every call, if an annotation of it has an array.

    Other functions are left to mypy: tests give them values of wrong types on purpose, to see their messages. So are
    constructors: JAX also fills its containers with shardings, None or placeholders.
    """
    if function.__name__ == "__init__":
        return function
    annotations = getattr(function, "__annotations__", {}).values()
    return _checked(function) if any(map(_has_array, annotations)) else function


def _has_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if isinstance(annotation, list):  # the arguments of a Callable
        return any(map(_has_array, annotation))
    return any(map(_has_array, typing.get_args(annotation)))
