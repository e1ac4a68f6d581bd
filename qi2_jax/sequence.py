"""The joint sequence of text and images: order, positions, visibility and rotary embedding.

A sequence is `[text 0][condition 1][text 1] ... [condition k][text k][target]`. Its layout (the number of slots of each
segment) is static and determines the compiled program. The content of the slots (lengths, image grids) is data, which
the host prepares. Each segment ends in padding.

Dims: `B` batch, `S` joint sequence, `T` text slots, `M` condition slots, `N` target slots, `P` prefix (all but the
target), `D` width.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Grid = tuple[int, int]  # (rows, columns) of an image in latent tokens

BLOCK_CAUSAL, BIDIRECTIONAL = "block_causal", "bidirectional"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Number of slots of each segment.

    Attributes:
      text: slots of the text segments; there is one segment more than there are condition images.
      target: slots of the target image.
      conditions: slots of each condition image.

    Raises:
      ValueError: if the numbers of text segments and condition images do not fit, or a number of slots is negative.
    """

    text: tuple[int, ...]
    target: int
    conditions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.text) != len(self.conditions) + 1:
            raise ValueError(
                f"a layout with {len(self.conditions)} condition images needs {len(self.conditions) + 1} text "
                f"segments around them, got {len(self.text)}"
            )
        if self.target < 1 or min(self.text) < 0 or min(self.conditions, default=1) < 1:
            raise ValueError(f"slots must be positive, got {self}")

    @functools.cached_property
    def segments(self) -> tuple[tuple[str, int, int], ...]:
        """(kind, start, end) of each segment, in order; kind is "text", "condition" or "target"."""
        kinds = [("text", self.text[0])]
        for condition, text in zip(self.conditions, self.text[1:], strict=True):
            kinds += [("condition", condition), ("text", text)]
        kinds.append(("target", self.target))
        ends = np.cumsum([slots for _, slots in kinds]).tolist()
        return tuple((kind, end - slots, end) for (kind, slots), end in zip(kinds, ends, strict=True))

    @property
    def length(self) -> int:
        return self.segments[-1][2]

    @property
    def prefix(self) -> int:
        """Number of slots before the target."""
        return self.segments[-1][1]

    def text_slots(self, lengths: Sequence[int]) -> Int[np.ndarray, "tokens"]:
        """The slot, counted over the text segments alone, of each text token of a sample.

        Args:
          lengths: real tokens of each text segment; they fill the first slots of their segment.

        Raises:
          ValueError: if a segment is missing or has more tokens than slots.
        """
        if len(lengths) != len(self.text) or any(map(operator.gt, lengths, self.text)):
            raise ValueError(f"text segments of {tuple(lengths)} tokens do not fit in the slots of {self}")
        starts = np.cumsum([0, *self.text])
        return np.concatenate([np.arange(length) + start for start, length in zip(starts, lengths, strict=False)])

    def visible_until(self, attention: str = BLOCK_CAUSAL) -> np.ndarray:
        """The number of leading slots that each slot sees, int32 [S]; validity masks the padding among them.

        `block_causal`: token i sees token j if j <= i or both lie in the same image. `bidirectional`: all tokens.

        Raises:
          ValueError: for another rule.
        """
        if attention == BIDIRECTIONAL:
            return np.full(self.length, self.length, np.int32)
        if attention != BLOCK_CAUSAL:
            raise ValueError(f"attention {attention!r} is unknown; choose {BLOCK_CAUSAL!r} or {BIDIRECTIONAL!r}")
        runs = [
            np.arange(start, end) + 1 if kind == "text" else np.full(end - start, end)
            for kind, start, end in self.segments
        ]
        return np.concatenate(runs).astype(np.int32)


def place(
    layout: Layout, text_lengths: Sequence[int], target: Grid, conditions: Sequence[Grid] = ()
) -> tuple[Int[np.ndarray, "S 3"], Bool[np.ndarray, "S"]]:
    """Positions and validity of one sample in a layout.

    A text token has position (p, p, p) and advances p by one. An image has frame = p, rows -(h - h//2) .. h//2 - 1 and
    columns likewise, and then advances p by max(h, w). Only real tokens count, so padding never changes a position
    (rotary embedding of Qwen-Image-2.1, diffusers `transformer_qwenimage21.py`).

    Args:
      layout: slots of the segments.
      text_lengths: number of tokens in each text segment, without padding.
      target: grid of the target image.
      conditions: grid of each condition image.

    Returns:
      int32 positions (frame, row, column), zero at padding, and validity.

    Raises:
      ValueError: if a segment does not fit its slots, or the numbers of segments differ from the layout's.
    """
    if len(text_lengths) != len(layout.text) or len(conditions) != len(layout.conditions):
        raise ValueError(
            f"the layout has {len(layout.text)} text segments and {len(layout.conditions)} condition images, "
            f"the sample {len(text_lengths)} and {len(conditions)}"
        )
    positions, valid = np.zeros((layout.length, 3), np.int32), np.zeros(layout.length, bool)
    lengths, grids = iter(text_lengths), iter([*conditions, target])
    p = 0
    for kind, start, end in layout.segments:
        if kind == "text":
            count = next(lengths)
            here = np.repeat(np.arange(p, p + count)[:, None], 3, axis=1)
            p += count
        else:
            rows, columns = next(grids)
            count = rows * columns
            here = np.stack(
                [
                    np.full(count, p),
                    np.repeat(np.arange(rows) - (rows - rows // 2), columns),
                    np.tile(np.arange(columns) - (columns - columns // 2), rows),
                ],
                axis=1,
            )
            p += max(rows, columns)
        if count > end - start:
            raise ValueError(f"{count} {kind} tokens do not fit in the {end - start} slots of the layout {layout}")
        positions[start : start + count], valid[start : start + count] = here, True
    return positions, valid


def join(
    layout: Layout,
    text_BTD: Float[Array, "B T D"],
    conditions_BMD: Float[Array, "B M D"] | None,
    target_BND: Float[Array, "B N D"] | None,
) -> Float[Array, "B S D"]:
    """Interleaves the segments in the layout's order; without `target_BND`, the prefix alone."""
    parts, text, condition = [], 0, 0
    for kind, start, end in layout.segments:
        slots = end - start
        if kind == "text":
            parts.append(text_BTD[:, text : text + slots])
            text += slots
        elif kind == "condition":
            assert conditions_BMD is not None
            parts.append(conditions_BMD[:, condition : condition + slots])
            condition += slots
        elif target_BND is not None:
            parts.append(target_BND)
    return jnp.concatenate(parts, axis=1)


def rotations(
    positions_BS3: Int[Array, "B S 3"], axis_dims: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "B S K"], Float[Array, "B S K"]]:
    """Cosine and sine of the rotary embedding in fp32, each angle repeated for both members of its adjacent pair.

    Args:
      positions_BS3: (frame, row, column) of each token.
      axis_dims: number of head dims that each of the three position axes rotates; even, with sum K.
      theta: base of the geometric series of frequencies.
    """
    angles = []
    for axis, dim in enumerate(axis_dims):
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        angles.append(positions_BS3[..., axis, None].astype(jnp.float32) * frequencies)
    angles_BSK = jnp.repeat(jnp.concatenate(angles, axis=-1), 2, axis=-1)
    return jnp.cos(angles_BSK), jnp.sin(angles_BSK)


@jax.custom_vjp
def rotate(
    x_BSHK: Float[Array, "B S H K"], rotation: tuple[Float[Array, "B S K"], Float[Array, "B S K"]]
) -> Float[Array, "B S H K"]:
    """Rotates adjacent pairs of the head width, in fp32; returns the dtype of `x_BSHK`.

    The gradient is rotated back, in its own dtype. Cosine and sine depend on positions alone and get no gradient.

    Args:
      x_BSHK: queries or keys.
      rotation: cosine and sine from `rotations`.
    """
    cos, sin = (part[:, :, None, :] for part in rotation)
    turned = jax.lax.platform_dependent(x_BSHK, tpu=quarter_turn_by_product, default=quarter_turn_by_shifts)
    return (x_BSHK.astype(jnp.float32) * cos + turned * sin).astype(x_BSHK.dtype)


def _rotate_forward(x_BSHK: Any, rotation: Any) -> tuple[Any, Any]:
    return rotate(x_BSHK, rotation), rotation


def _rotate_backward(rotation: Any, gradient_BSHK: Any) -> tuple[Any, None]:
    cos, sin = rotation
    return rotate(gradient_BSHK, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def quarter_turn_by_shifts(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """Turns every adjacent pair (a, b) of the last dim into (-b, a), in fp32.

    Each entry reads its neighbour through a shift by one. Shifts need no wrap-around, unlike rolls, and are therefore
    computed where they are read.
    """
    x = x.astype(jnp.float32)
    even = np.arange(x.shape[-1]) % 2 == 0
    rest = [(0, 0, 0)] * (x.ndim - 1)
    after, before = (jax.lax.pad(x, jnp.float32(0), [*rest, (shift, -shift, 0)]) for shift in (-1, 1))
    return jnp.where(even, -after, before)


def quarter_turn_by_product(x: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """The same values as a matrix product with a signed permutation.

    On TPU, slices and shifts of the last dim are written to HBM in fp32. This product is fused with the norm before it
    and the rotation after it, and adds half a percent to the operations of a block. It is exact: each sum has one term
    other than zero, and the highest precision splits fp32 into parts without loss.
    """
    K = x.shape[-1]
    pairs = np.arange(0, K, 2)
    turn_KK = np.zeros((K, K), np.float32)
    turn_KK[pairs + 1, pairs], turn_KK[pairs, pairs + 1] = -1, 1
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, turn_KK.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
