"""Attention: one function, several kernels behind it, one plain reference.

Kernels: `reference` (the definition, for tests), `chunked` (plain JAX, for any platform), `splash` (Pallas, for TPU).

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads (H is a multiple of G), `K` head width.
"""

from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from qi2_jax.attention.chunked import chunked
from qi2_jax.attention.reference import reference
from qi2_jax.attention.splash import Splash


class Kernel(Protocol):
    """Computes `attention`; hashable, so that what holds it can be static under `jit`."""

    def __call__(
        self,
        q_BSHK: Float[Array, "B S H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        visible_until: np.ndarray | None,
        key_valid_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B S H K"]: ...


def attention(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    *,
    visible_until: np.ndarray | None = None,
    key_valid_BT: Bool[Array, "B T"] | None = None,
    kernel: str | Kernel = "reference",
) -> Float[Array, "B S H K"]:
    """Scaled dot-product attention in which query i sees the valid keys j < visible_until[i].

    Args:
      q_BSHK, k_BTGK, v_BTGK: queries, keys and values, already rotated; the scale is K ** -0.5.
      visible_until: static integers [S], the end of the run of keys that each query sees; None: every key.
      key_valid_BT: False marks padding, which no query sees; None: every key is real.
      kernel: one of `KERNELS`, "auto" (`splash` on TPU, elsewhere `chunked`), or a kernel itself. A program over
        several devices takes `sharding.Attention`, which knows how batch and heads are split.

    Returns:
      The mean of the visible values, in the dtype of `q_BSHK`. Rows of queries that see no valid key are finite and
      meaningless.

    Raises:
      ValueError: for an unknown kernel.
    """
    if isinstance(kernel, str):
        kernel = choose(kernel, jax.default_backend())
    return kernel(q_BSHK, k_BTGK, v_BTGK, visible_until, key_valid_BT)


def choose(name: str, platform: str) -> Kernel:
    """The kernel of that name; "auto" is the fastest one for a platform such as "tpu" or "cpu".

    Raises:
      ValueError: for an unknown name.
    """
    if name == "auto":
        name = "splash" if platform == "tpu" else "chunked"
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is unknown; choose one of {sorted([*KERNELS, 'auto'])}")
    return KERNELS[name]


KERNELS: dict[str, Kernel] = {"reference": reference, "chunked": chunked, "splash": Splash()}
