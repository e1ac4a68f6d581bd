"""Attention: one function with several kernels, and a plain reference.

Kernels: `reference` (the definition, for tests), `chunked` (plain JAX, for any platform), `splash` (Pallas, for TPU).

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads (H is a multiple of G), `K` head width.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from qi2_jax.attention.chunked import chunked
from qi2_jax.attention.reference import RESULT as RESULT
from qi2_jax.attention.reference import reference
from qi2_jax.attention.splash import OVERHEADS, Splash


@runtime_checkable
class Kernel(Protocol):
    """An implementation of `attention`; hashable, so that it can be static under `jit`."""

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
      q_BSHK, k_BTGK, v_BTGK: rotated queries and keys, and values; scores are scaled by K ** -0.5.
      visible_until: static integers [S], the number of leading keys that each query sees; None: all keys.
      key_valid_BT: mask of keys, False at padding, which no query sees; None: no padding.
      kernel: name in `KERNELS`, "auto" (`splash` on TPU, `chunked` elsewhere), or a kernel. A program on several
        devices uses `sharding.Attention`, which knows how batch and heads are sharded.

    Returns:
      The weighted mean of the visible values, in the dtype of `q_BSHK`. It is finite but meaningless for queries that
      see no valid key.

    Raises:
      ValueError: for an unknown kernel.
    """
    if isinstance(kernel, str):
        kernel = choose(kernel, jax.devices()[0])
    return kernel(q_BSHK, k_BTGK, v_BTGK, visible_until, key_valid_BT)


def choose(name: str, device: Any) -> Kernel:
    """The kernel with a name for a device, which may be absent; "auto" means the fastest one for its platform.

    Raises:
      ValueError: for an unknown name.
    """
    if name == "auto":
        name = "splash" if device.platform == "tpu" else "chunked"
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is unknown; choose one of {sorted([*KERNELS, 'auto'])}")
    if name == "splash" and device.device_kind in OVERHEADS:
        return Splash(overhead=OVERHEADS[device.device_kind])
    return KERNELS[name]


KERNELS: dict[str, Kernel] = {"reference": reference, "chunked": chunked, "splash": Splash()}
