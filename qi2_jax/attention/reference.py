"""The definition of attention, with the whole matrix of scores in fp32; tests compare every kernel with it.

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads, `R` query heads per key-value head,
`K` head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

RESULT = "attention"  # name of every kernel's result, which `jax.checkpoint` may keep for the backward pass
NEGATIVE = -1e30  # finite, so that a query without visible keys gets a mean of values instead of NaN


def reference(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    visible_until: np.ndarray | None,
    key_valid_BT: Bool[Array, "B T"] | None,
) -> Float[Array, "B S H K"]:
    """See `attention`."""
    (B, S, H, K), (T, G) = q_BSHK.shape, k_BTGK.shape[1:3]
    q_BSGRK = q_BSHK.reshape(B, S, G, H // G, K)
    scores = jnp.einsum("bsgrk,btgk->bgrst", q_BSGRK, k_BTGK, preferred_element_type=jnp.float32) * K**-0.5
    if visible_until is not None:
        scores = jnp.where(np.arange(T)[None, :] < np.asarray(visible_until)[:, None], scores, NEGATIVE)
    if key_valid_BT is not None:
        scores = jnp.where(key_valid_BT[:, None, None, None, :], scores, NEGATIVE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTGK.dtype)
    y_BSGRK = jnp.einsum("bgrst,btgk->bsgrk", weights, v_BTGK)
    return checkpoint_name(y_BSGRK.reshape(B, S, H, K).astype(q_BSHK.dtype), RESULT)
