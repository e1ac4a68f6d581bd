"""What the backward pass of a block keeps from its forward pass, and what it computes again.

A block names its larger intermediate values. A policy is a list of names: those values are kept, the others are
computed again from them and from the block's input. Norms, modulation, rotary embedding and activation functions are
cheap, and are always computed again.

For a width D, the values of one token have the following sizes, in units of D; the hidden layer has `mlp_ratio` x D:

| policy | kept | size |
| --- | --- | --- |
| `host` | the block's input, in the memory of the host | 0 |
| `inputs` | the block's input | 1 |
| `attention` | also the result of attention | 2 |
| `projections` | also queries and keys before their norms, values, and the outputs of attention and MLP | 7 |
| `gate` | also one factor of the MLP's hidden layer | 7 + mlp_ratio |
| `hidden` | also the other one | 7 + 2 mlp_ratio |
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from qi2_jax.attention import RESULT

# Names of values, beside that of attention's result.
INPUT, PROJECTIONS, GATE, HIDDEN = "input", "projections", "gate", "hidden"
HOST = "host"
# Values that each policy keeps besides the inputs of blocks.
POLICIES: dict[str, tuple[str, ...]] = {
    HOST: (),
    "inputs": (),
    "attention": (RESULT,),
    "projections": (RESULT, PROJECTIONS),
    "gate": (RESULT, PROJECTIONS, GATE),
    "hidden": (RESULT, PROJECTIONS, GATE, HIDDEN),
}

named = checkpoint_name


def recomputed(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A function whose backward pass keeps its arguments and the values of a policy.

    Args:
      body: function that names its intermediate values with `named`.
      policy: a name in `POLICIES`.
    """
    policies = jax.checkpoint_policies
    if policy == HOST:
        keep = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        keep = policies.save_only_these_names(*POLICIES[policy])
    return jax.checkpoint(body, policy=keep)


def recomputed_products(policy: str, mlp_ratio: int) -> tuple[float, float]:
    """How much of a forward pass the backward pass repeats: a share of the linear layers, and a share of attention."""
    kept = POLICIES[policy]
    shares = {PROJECTIONS: 4 + mlp_ratio, GATE: mlp_ratio, HIDDEN: mlp_ratio}  # products of D x D for each token
    blocks = sum(share for name, share in shares.items() if name not in kept) / (4 + 3 * mlp_ratio)
    return blocks, float(RESULT not in kept)


def kept_size(policy: str, mlp_ratio: int) -> int:
    """Number of values that a policy keeps of each block and token, in units of the model's width."""
    sizes = {RESULT: 1, PROJECTIONS: 5, GATE: mlp_ratio, HIDDEN: mlp_ratio}
    return (policy != HOST) + sum(sizes[name] for name in POLICIES[policy])


# Values of one token, in units of the model's width, that the backward pass of a block has beside those it keeps; the
# largest number in programs compiled for v6e.
WORKING = 68


def richest(values: float, layers: int, mlp_ratio: int) -> str:
    """The policy that keeps the most; `inputs` if none fits.

    It is never `host`: how fast the host is, nothing here knows.

    Args:
      values: number of values of one token that there is memory for, in units of the model's width.
      layers: number of blocks.
      mlp_ratio: hidden width of the MLP in units of the model's width.
    """
    most = (values - WORKING) / layers
    return max(
        (policy for policy in POLICIES if policy != HOST and kept_size(policy, mlp_ratio) <= most),
        key=lambda policy: kept_size(policy, mlp_ratio),
        default="inputs",
    )
