"""Attention: one function, several kernels behind it, one plain reference.

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads (H is a multiple of G), `K` head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NEGATIVE = -1e30  # a finite "minus infinity": a query that sees no valid key gets a mean of values instead of NaN


def attention(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    *,
    visible_until: np.ndarray | None = None,
    key_valid_BT: Bool[Array, "B T"] | None = None,
    kernel: str = "reference",
) -> Float[Array, "B S H K"]:
    """Scaled dot-product attention in which query i sees the valid keys j < visible_until[i].

    Args:
      q_BSHK, k_BTGK, v_BTGK: queries, keys and values, already rotated; the scale is K ** -0.5.
      visible_until: static integers [S], the end of the run of keys that each query sees; None: every key.
      key_valid_BT: False marks padding, which no query sees; None: every key is real.
      kernel: one of `KERNELS`.

    Returns:
      The mean of the visible values, in the dtype of `q_BSHK`. Rows of queries that see no valid key are finite and
      meaningless.

    Raises:
      ValueError: for an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel {kernel!r} is unknown; choose one of {sorted(KERNELS)}")
    return KERNELS[kernel](q_BSHK, k_BTGK, v_BTGK, visible_until, key_valid_BT)


def reference(q_BSHK, k_BTGK, v_BTGK, visible_until, key_valid_BT):
    """The definition, with the whole matrix of scores in fp32."""
    (B, S, H, K), (T, G) = q_BSHK.shape, k_BTGK.shape[1:3]
    q_BSGRK = q_BSHK.reshape(B, S, G, H // G, K)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q_BSGRK, k_BTGK, preferred_element_type=jnp.float32) * K**-0.5
    if visible_until is not None:
        scores = jnp.where(np.arange(T)[None, :] < np.asarray(visible_until)[:, None], scores, NEGATIVE)
    if key_valid_BT is not None:
        scores = jnp.where(key_valid_BT[:, None, None, None, :], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTGK.dtype)
    return jnp.einsum("bgrst,btgk->bsgrk", weights, v_BTGK).reshape(B, S, H, K).astype(q_BSHK.dtype)


KERNELS = {"reference": reference}
