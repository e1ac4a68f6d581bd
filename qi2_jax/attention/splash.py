"""Attention on TPU with Pallas' splash kernel: scores stay in VMEM, and blocks that no query sees are skipped.

Dims: `B` batch, `S` queries, `T` keys, `H` query heads, `G` key-value heads, `K` head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float

from qi2_jax.attention.reference import RESULT

LANES = 128  # block sizes of the kernel are multiples of this


@dataclasses.dataclass(frozen=True)
class Splash:
    """A `Kernel` for one TPU device (or one shard of a mesh, see `sharding.Attention`).

    Attributes:
      largest_block: maximum number of queries per block; an inner step computes at most its square of pairs. 1024 fits
        the VMEM of v5e and v6e up to a head width of 128; wider heads use proportionally smaller blocks.
      overhead: see `OVERHEADS`.
      interpret: whether to run in Pallas' interpreter, which needs no TPU but is slow; for tests.
    """

    largest_block: int = 1024
    overhead: int = 1 << 18
    interpret: bool = False

    def __call__(
        self,
        q_BSHK: Float[Array, "B S H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        visible_until: np.ndarray | None,
        key_valid_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B S H K"]:
        (B, S, H, K), T = q_BSHK.shape, k_BTGK.shape[1]
        until = np.full(S, T) if visible_until is None else np.clip(visible_until, 1, T)
        queries, keys, step = block_sizes(until, self.largest_block * LANES // max(K, LANES), self.overhead)
        padded_S, padded_T = _round_up(S, queries), _round_up(T, keys)
        mask = _VisibleUntil(np.pad(until, (0, padded_S - S), mode="edge"), padded_T)
        kernel = pallas.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            # The fused backward pass needs five products instead of seven, and writes one partial dq per block of keys.
            block_sizes=pallas.BlockSizes(
                block_q=queries,
                block_kv=keys,
                block_kv_compute=step,
                block_q_dkv=queries,
                block_kv_dkv=keys,
                block_kv_dkv_compute=step,
                use_fused_bwd_kernel=True,
            ),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=RESULT,  # with the sums of the softmax, which the backward pass reads
            interpret=self.interpret,
        )
        segments = None
        if key_valid_BT is not None:
            # All queries are in segment 1, padding included: padding then attends to real keys and stays finite.
            valid_BT = jnp.pad(key_valid_BT.astype(jnp.int32), ((0, 0), (0, padded_T - T)))
            segments = pallas.SegmentIds(q=jnp.ones((B, padded_S), jnp.int32), kv=valid_BT)
        q_BHSK, k_BGTK, v_BGTK = (
            jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, slots - x.shape[1]), (0, 0)))
            for x, slots in ((q_BSHK * K**-0.5, padded_S), (k_BTGK, padded_T), (v_BTGK, padded_T))
        )
        return jax.vmap(kernel)(q_BHSK, k_BGTK, v_BGTK, segments)[:, :, :S].swapaxes(1, 2)


def computed_pairs(visible_until: np.ndarray, queries: int, keys: int) -> int:
    """Pairs of a query and a key that the kernel computes for one head: all of a block in which a query sees a key.

    Args:
      visible_until: number of leading keys that each query sees.
      queries: queries per block.
      keys: keys per block.
    """
    padded = np.pad(visible_until, (0, -len(visible_until) % queries), mode="edge")
    blocks = -(-padded.reshape(-1, queries).max(axis=1) // keys)
    return int(blocks.sum()) * queries * keys


# Overhead of a block by `device_kind`, as the number of pairs of a query and a key that take as long: about 0.35 us to
# start it, in each pass, and 0.5 us to write a partial dq of 1,024 queries, at 45% of the chip's peak rate. Nobody has
# measured it for this kernel.
OVERHEADS = {"TPU v5 lite": 1 << 16, "TPU v5": 1 << 17, "TPU v6 lite": 1 << 18}


def block_sizes(visible_until: np.ndarray, largest: int, overhead: int) -> tuple[int, int, int]:
    """The cheapest block sizes: queries, keys, and keys of an inner step.

    Small blocks compute fewer pairs that no query sees, and large ones have less overhead.

    Args:
      visible_until: number of leading keys that each query sees.
      largest: see `Splash.largest_block`.
      overhead: see `OVERHEADS`.
    """
    candidates = [
        (queries, keys, step)
        for queries in range(LANES, max(LANES, largest) + 1, LANES)
        for keys in range(LANES, max(LANES, 2 * largest) + 1, LANES)
        if (step := _inner_step(keys, max(LANES, largest**2 // queries)))
    ]

    def cost(sizes: tuple[int, int, int]) -> float:
        queries, keys, _ = sizes
        return computed_pairs(visible_until, queries, keys) * (1 + overhead / (queries * keys))

    return min(candidates, key=cost)


def _inner_step(keys: int, most: int) -> int:
    """The longest inner step of a block of keys, at most `most`; 0 if that is shorter than a third of the block."""
    parts = [part for part in (1, 2, 3) if keys % (part * LANES) == 0 and keys // part <= most]
    return keys // parts[0] if parts else 0


def _round_up(length: int, block: int) -> int:
    return math.ceil(length / block) * block


class _VisibleUntil(masks.Mask):
    """Query i sees keys j < until[i]; evaluated block by block, on the host and inside the kernel.

    The kernel passes each query's entry of `q_sequence` to `mask_function`. The library means an index by that; here it
    is the number of visible keys.
    """

    def __init__(self, until_S: np.ndarray, keys: int):
        self.q_sequence, self.keys = until_S.astype(np.int32), keys

    mask_function = staticmethod(lambda until, key: key < until)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), self.keys

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        return self.mask_function(self.q_sequence[queries][:, None], np.arange(self.keys)[None, keys])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _VisibleUntil)
            and self.keys == other.keys
            and np.array_equal(self.q_sequence, other.q_sequence)
        )

    def __hash__(self) -> int:
        return hash((self.keys, self.q_sequence.tobytes()))
