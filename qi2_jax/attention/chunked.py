"""Attention in plain JAX without an S x T array: it computes one head and one chunk of queries at a time.

XLA's CPU backend is slow at batched products of small matrices; a sequence of plain 2-D products runs several times
faster (`tests/benchmarks/attention_cpu.py`). The backward pass computes the scores of a chunk again from the statistics
of its softmax (FlashAttention, Dao et al., 2022, algorithm 4).

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads, `R` query heads per key-value head,
`K` head width, `A` key-value heads of all samples, `N` chunks, `C` queries of a chunk, `X` rows of a chunk (its queries
for each of R heads), `E` keys that a group of chunks sees.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qi2_jax.attention.reference import NEGATIVE, RESULT

CHUNK = 256  # queries per chunk
LEVELS = 4  # a chunk reads 1/4, 2/4, .. of the keys and skips the rest; each level is compiled once

Operands = tuple[Float[Array, "A N X K"], Float[Array, "A T K"], Float[Array, "A T K"], Bool[Array, "A T"] | None]
Statistics = tuple[Float[Array, "A N X 1"], Float[Array, "A N X 1"]]  # largest score, and sum of exponentials below it


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Consecutive chunks that read the same leading keys.

    Attributes:
      start, end: range of its chunks.
      keys: number of leading keys that it reads.
      until_NX: number of leading keys that each row sees; None: all rows see all `keys`.
    """

    start: int
    end: int
    keys: int
    until_NX: np.ndarray | None


def chunked(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    visible_until: np.ndarray | None,
    key_valid_BT: Bool[Array, "B T"] | None,
) -> Float[Array, "B S H K"]:
    """See `attention`. The backward pass computes the scores again."""
    (B, S, H, K), (T, G) = q_BSHK.shape, k_BTGK.shape[1:3]
    R, N = H // G, math.ceil(S / CHUNK)
    C = math.ceil(S / N)
    until_S = np.full(S, T) if visible_until is None else np.minimum(visible_until, T)
    until_NX = np.tile(np.pad(until_S, (0, N * C - S), mode="edge").reshape(N, C), R)
    q_BSHK = jnp.pad(q_BSHK, ((0, 0), (0, N * C - S), (0, 0), (0, 0)))
    q_ANXK = q_BSHK.reshape(B, N, C, G, R, K).transpose(0, 3, 1, 4, 2, 5).reshape(B * G, N, R * C, K)
    k_ATK, v_ATK = (x.swapaxes(1, 2).reshape(B * G, T, K) for x in (k_BTGK, v_BTGK))
    valid_AT = None if key_valid_BT is None else jnp.repeat(key_valid_BT, G, axis=0)
    y_ANXK = _attend(_groups(until_NX, T), (q_ANXK, k_ATK, v_ATK, valid_AT))
    return y_ANXK.reshape(B, G, N, R, C, K).transpose(0, 2, 4, 1, 3, 5).reshape(B, N * C, H, K)[:, :S]


def _groups(until_NX: np.ndarray, T: int) -> tuple[_Group, ...]:
    levels_N = -(-until_NX.max(axis=1) * LEVELS // T)
    groups = []
    for start, end in itertools.pairwise([0, *np.flatnonzero(np.diff(levels_N)) + 1, len(until_NX)]):
        keys, until = math.ceil(levels_N[start] * T / LEVELS), until_NX[start:end]
        groups.append(_Group(start, end, keys, None if until.min() >= keys else until))
    return tuple(groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(groups: tuple[_Group, ...], operands: Operands) -> Float[Array, "A N X K"]:
    return _forward(groups, operands)[0]


def _forward(groups: tuple[_Group, ...], operands: Operands) -> tuple[Float[Array, "A N X K"], Any]:
    """The result, and what the backward pass reads: the operands, the result and the statistics."""

    def head(operands: Any) -> Any:
        q_NXK, k_TK, v_TK, valid_T = operands
        results = []
        for group in groups:
            k_EK, v_EK = k_TK[: group.keys], v_TK[: group.keys]

            def chunk(rows: Any, k_EK: Any = k_EK, v_EK: Any = v_EK) -> Any:
                q_XK, until_X = rows
                scores, _ = _scores(q_XK, k_EK, until_X, valid_T)
                top = jnp.max(scores, axis=-1, keepdims=True)
                weights = jnp.exp(scores - top)
                total = jnp.sum(weights, axis=-1, keepdims=True)
                y_XK = jnp.dot(weights.astype(v_EK.dtype), v_EK, preferred_element_type=jnp.float32) / total
                return y_XK.astype(q_XK.dtype), top, total

            results.append(jax.lax.map(chunk, (q_NXK[group.start : group.end], group.until_NX)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

    y_ANXK, *statistics = checkpoint_name(jax.lax.map(head, operands), RESULT)
    return y_ANXK, (operands, y_ANXK, tuple(statistics))


def _backward(groups: tuple[_Group, ...], kept: Any, dy_ANXK: Float[Array, "A N X K"]) -> tuple[Operands]:
    """Gradients of the operands.

    Those of keys and values are summed as [K, E]: XLA's CPU backend contracts the first dims of two matrices faster if
    the narrower matrix comes first.
    """

    def head(kept: Any) -> Any:
        (q_NXK, k_TK, v_TK, valid_T), y_NXK, statistics, dy_NXK = kept
        (T, K), dq = k_TK.shape, []
        dk_KT = dv_KT = jnp.zeros((K, T), jnp.float32)
        for group in groups:
            k_EK, v_EK = (x[: group.keys].astype(jnp.float32) for x in (k_TK, v_TK))

            def chunk(sums: Any, rows: Any, k_EK: Any = k_EK, v_EK: Any = v_EK) -> Any:
                q_XK, until_X, y_XK, (top, total), dy_XK = rows
                scores, visible = _scores(q_XK, k_EK.astype(q_XK.dtype), until_X, valid_T)
                weights = jnp.exp(scores - top)  # not divided by `total`: that is cheaper for the narrow gradient
                dy_XK = dy_XK.astype(jnp.float32) / total
                mean = jnp.sum(dy_XK * y_XK.astype(jnp.float32), axis=-1, keepdims=True)
                dscores = weights * (jnp.dot(dy_XK, v_EK.T) - mean)
                dscores = dscores if visible is None else jnp.where(visible, dscores, 0)
                dk_KE, dv_KE = jnp.dot(q_XK.T.astype(jnp.float32), dscores), jnp.dot(dy_XK.T, weights)
                return (sums[0] + dk_KE, sums[1] + dv_KE), (K**-0.5 * jnp.dot(dscores, k_EK)).astype(q_XK.dtype)

            chunks = slice(group.start, group.end)
            rows = q_NXK[chunks], group.until_NX, y_NXK[chunks], [x[chunks] for x in statistics], dy_NXK[chunks]
            sums = dk_KT[:, : group.keys], dv_KT[:, : group.keys]
            sums, dq_NXK = jax.lax.scan(chunk, sums, rows)
            dk_KT, dv_KT = (
                jax.lax.dynamic_update_slice(whole, part, (0, 0))
                for whole, part in zip((dk_KT, dv_KT), sums, strict=True)
            )
            dq.append(dq_NXK)
        return jnp.concatenate(dq), (K**-0.5 * dk_KT).T.astype(k_TK.dtype), dv_KT.T.astype(v_TK.dtype)

    kept = jax.lax.optimization_barrier(kept)  # where no loop is left, XLA would reuse the forward pass's scores
    return ((*jax.lax.map(head, (*kept, dy_ANXK)), None),)


_attend.defvjp(_forward, _backward)


def _scores(
    q_XK: Float[Array, "X K"],
    k_EK: Float[Array, "E K"],
    until_X: Int[Array, "X"] | None,
    valid_T: Bool[Array, "T"] | None,
) -> tuple[Float[Array, "X E"], Bool[Array, "#X E"] | None]:
    """Scores in fp32, and which of them count; None: all."""
    E, K = k_EK.shape
    scores = jnp.dot(q_XK, k_EK.T, preferred_element_type=jnp.float32) * K**-0.5
    if until_X is None and valid_T is None:
        return scores, None
    visible = jnp.ones((1, E), bool) if valid_T is None else valid_T[None, :E]
    if until_X is not None:
        visible = visible & (np.arange(E) < until_X[:, None])
    return jnp.where(visible, scores, NEGATIVE), visible
