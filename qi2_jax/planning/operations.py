"""Counts the operations of a function from its jaxpr, where loops count as often as they run.

The compiler's own count takes the body of a loop once, and needs a compilation.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of matrix products and convolutions; a product of [m, k] and [k, n] counts as 2 m k n.

    Of a branch, the most expensive alternative counts. Zeros that a strided convolution inserts in its backward pass do
    not count, and zeros beyond the edges of an image do.

    Args:
      function: function of arrays, which is traced and not run.
      arguments: arrays, or their shapes.

    Raises:
      ValueError: for a loop whose number of iterations depends on data.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[dim] for dim in contracted)
    if name == "conv_general_dilated":
        rhs, dims = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        inputs = math.prod(rhs[dim] for dim in dims[1:])  # of one output: channels of a group x kernel
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * inputs / math.prod(params["lhs_dilation"])
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "while" and any(inner):
        raise ValueError("the function has a loop whose number of iterations depends on data; count its body alone")
    if name == "cond":
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs in an equation's parameters."""
    for value in jax.tree.leaves(
        list(params.values()), is_leaf=lambda leaf: isinstance(leaf, core.Jaxpr | core.ClosedJaxpr)
    ):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
