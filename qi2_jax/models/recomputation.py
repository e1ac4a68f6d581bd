"""What the backward pass of a block keeps from its forward pass, and what it computes again.

A block names its larger intermediate values. A policy is a list of names: those values are kept, the others are
computed again from them and from the block's input. Norms, modulation, rotary embedding and activation functions are
cheap, and are always computed again.

For a width D, the values of one token have the following sizes, in units of D; the hidden layer has `mlp_ratio` x D:

| policy | kept | size |
| --- | --- | --- |
| `inputs` | the block's input | 1 |
| `attention` | also the result of attention | 2 |
| `projections` | also queries and keys before their norms, values, and the outputs of attention and MLP | 7 |
| `hidden` | also both factors of the MLP's hidden layer | 7 + 2 mlp_ratio |
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from qi2_jax.attention import RESULT

PROJECTIONS, HIDDEN = "projections", "hidden"  # names of values, beside that of attention's result
# Values that each policy keeps besides the inputs of blocks.
POLICIES: dict[str, tuple[str, ...]] = {
    "inputs": (),
    "attention": (RESULT,),
    "projections": (RESULT, PROJECTIONS),
    "hidden": (RESULT, PROJECTIONS, HIDDEN),
}

named = checkpoint_name


def recomputed(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A function whose backward pass keeps its arguments and the values of a policy.

    Args:
      body: function that names its intermediate values with `named`.
      policy: a name in `POLICIES`.
    """
    return jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*POLICIES[policy]))


def recomputed_products(policy: str, mlp_ratio: int) -> tuple[float, float]:
    """How much of a forward pass the backward pass repeats: a share of the linear layers, and a share of attention."""
    kept = POLICIES[policy]
    shares = {PROJECTIONS: 4 + mlp_ratio, HIDDEN: 2 * mlp_ratio}  # products of D x D for each token
    blocks = sum(share for name, share in shares.items() if name not in kept) / (4 + 3 * mlp_ratio)
    return blocks, float(RESULT not in kept)
