"""Attention in plain JAX without an S x T array: it computes one head and one chunk of queries at a time.

XLA's CPU backend is slow at batched products of small matrices; a sequence of plain 2-D products runs several times
faster (`tests/benchmarks/attention_cpu.py`).

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads, `R` query heads per key-value head,
`K` head width, `N` chunks, `C` queries of a chunk, `E` keys that a group of chunks sees.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qi2_jax.attention.reference import NEGATIVE, RESULT

CHUNK = 256  # queries per chunk
LEVELS = 4  # a chunk reads 1/4, 2/4, .. of the keys and skips the rest; each level is compiled once


def chunked(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    visible_until: np.ndarray | None,
    key_valid_BT: Bool[Array, "B T"] | None,
) -> Float[Array, "B S H K"]:
    """See `attention`. The backward pass recomputes the scores."""
    (B, S, H, K), (T, G) = q_BSHK.shape, k_BTGK.shape[1:3]
    N = math.ceil(S / CHUNK)
    C = math.ceil(S / N)
    until_S = np.full(S, T) if visible_until is None else np.minimum(visible_until, T)
    until_NC = np.pad(until_S, (0, N * C - S), mode="edge").reshape(N, C)
    levels_N = -(-until_NC.max(axis=1) * LEVELS // T)
    bounds = [0, *np.flatnonzero(np.diff(levels_N)) + 1, N]

    @jax.checkpoint
    def chunk(
        q_RCK: Float[Array, "R C K"],
        until_C: Int[Array, "C"],
        k_EK: Float[Array, "E K"],
        v_EK: Float[Array, "E K"],
        valid_E: Bool[Array, "E"] | None,
    ) -> Float[Array, "R C K"]:
        R, E = q_RCK.shape[0], k_EK.shape[0]
        scores = jnp.dot(q_RCK.reshape(R * C, K), k_EK.T, preferred_element_type=jnp.float32).reshape(R, C, E)
        scores = jnp.where(np.arange(E) < until_C[:, None], scores * K**-0.5, NEGATIVE)
        if valid_E is not None:
            scores = jnp.where(valid_E, scores, NEGATIVE)
        weights = jax.nn.softmax(scores, axis=-1).astype(v_EK.dtype)
        return jnp.dot(weights.reshape(R * C, E), v_EK).reshape(R, C, K).astype(q_RCK.dtype)

    def head(
        operands: tuple[Float[Array, "N R C K"], Float[Array, "T K"], Float[Array, "T K"], Bool[Array, "T"] | None],
    ) -> Float[Array, "N R C K"]:
        q_NRCK, k_TK, v_TK, valid_T = operands
        groups = []
        for start, end in itertools.pairwise(bounds):
            E = math.ceil(levels_N[start] * T / LEVELS)
            seen = (k_TK[:E], v_TK[:E], None if valid_T is None else valid_T[:E])
            of_group = (q_NRCK[start:end], jnp.asarray(until_NC[start:end]))
            groups.append(jax.lax.map(lambda pair, seen=seen: chunk(*pair, *seen), of_group))
        return jnp.concatenate(groups)

    q_BSHK = jnp.pad(q_BSHK, ((0, 0), (0, N * C - S), (0, 0), (0, 0)))
    q_BGNRCK = q_BSHK.reshape(B, N, C, G, H // G, K).transpose(0, 3, 1, 4, 2, 5)
    per_head = (q_BGNRCK, k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2))
    valid = None if key_valid_BT is None else jnp.repeat(key_valid_BT, G, axis=0)
    y = jax.lax.map(head, (*(x.reshape(B * G, *x.shape[2:]) for x in per_head), valid))
    y_BSHK = y.reshape(B, G, N, H // G, C, K).transpose(0, 2, 4, 1, 3, 5).reshape(B, N * C, H, K)[:, :S]
    return checkpoint_name(y_BSHK, RESULT)
