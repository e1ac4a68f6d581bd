"""The single-stream multimodal diffusion transformer (MMDiT) of the Qwen-Image-2 family.

Text, clean condition images and the noisy target share one sequence (`qi2_jax.sequence`). Blocks are stacked and run by
one `lax.scan`. Modulation is purely multiplicative, without shifts, and one projection of the time embedding serves all
blocks (Qwen-Image-2.0 report, section 3.2; dimensions and tanh gates after the published Qwen-Image-2.1 weights).

Dims: `B` batch, `S` sequence, `T` text slots, `M` condition slots, `N` target slots, `P` prefix slots, `A` slots that
the sequence attends to (itself, after the prefix if that was computed before), `D` width, `H` heads, `K` head width,
`C` latent channels, `E` width of text features, `L` layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qi2_jax import sequence
from qi2_jax.attention import Kernel, attention
from qi2_jax.models.layers import AnyArray, Axes, Linear, RMSNorm, keys, stacked, standardize
from qi2_jax.models.recomputation import GATE, HIDDEN, INPUT, PROJECTIONS, named, recomputed

TIME_FEATURES, TIME_FACTOR, TIME_PERIOD = 256, 1000.0, 10_000.0
ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Architecture of the model. Widths are in channels; `rope_dims` (frame, row, column) add up to `head_width`.

    Attributes:
      attention: "block_causal" (released 2.1 weights) or "bidirectional" (implied by the 2.0 report).
      condition_timestep: "zero" modulates text and condition images with t = 0, so that the prefix does not depend on
        the sampled t; "sampled" modulates all tokens with the sampled t.

    Raises:
      ValueError: for sizes below 1, widths that do not fit together, or unknown values of the other options.
    """

    layers: int = 32
    heads: int = 32
    head_width: int = 128
    mlp_ratio: int = 3
    latent_channels: int = 64
    text_width: int = 4096
    rope_dims: tuple[int, int, int] = (16, 56, 56)
    eps: float = 1e-6
    attention: str = sequence.BLOCK_CAUSAL
    condition_timestep: str = "zero"

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_width", "mlp_ratio", "latent_channels", "text_width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps is {self.eps}; it must be between 0 and 1")
        if sum(self.rope_dims) != self.head_width or any(dim % 2 or dim < 0 for dim in self.rope_dims):
            raise ValueError(f"rope_dims {self.rope_dims} must be even and add up to head_width {self.head_width}")
        if self.condition_timestep not in ("zero", "sampled"):
            raise ValueError(f"condition_timestep {self.condition_timestep!r} must be 'zero' or 'sampled'")
        if self.attention not in (sequence.BLOCK_CAUSAL, sequence.BIDIRECTIONAL):
            raise ValueError(f"attention {self.attention!r} must be 'block_causal' or 'bidirectional'")

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model runs, which does not change what it computes; hashable, so that it can be static under `jit`.

    Attributes:
      dtype: dtype of activations; parameters keep theirs.
      kernel: attention kernel, see `qi2_jax.attention`; on several devices `sharding.Attention`.
      remat: whether the backward pass recomputes the blocks.
      keep: what it keeps of each block if it does, a policy in `recomputation.POLICIES`.
      constrain: function that shards an activation over the mesh by the logical names of its dims.
      gather: function that gathers the weights of a block on each device.
      unroll: number of blocks in a step of the loop over blocks; the compiler can hide the gather of a block's first
        weights only behind another block of the same step.
      shard_sum: dtype in which the gradients of the blocks' matrices are added up across devices; None: `dtype`.
    """

    dtype: Any = jnp.float32
    kernel: str | Kernel = "auto"
    remat: bool = False
    keep: str = "inputs"
    constrain: Callable[[Array, Axes], Array] = lambda x, axes: x
    gather: Callable[[Any], Any] = lambda block: block
    unroll: int = 1
    shard_sum: Any = None


class Conditioning(NamedTuple):
    """Conditioning of samples, padded to a layout: text features, clean condition latents, positions and validity."""

    text_BTE: Float[AnyArray, "B T E"]
    positions_BS3: Int[AnyArray, "B S 3"]
    valid_BS: Bool[AnyArray, "B S"]
    conditions_BMC: Float[AnyArray, "B M C"] | None = None


class Attention(nnx.Module):
    """Multi-head self-attention with RMSNorm on queries and keys, then rotary positions."""

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng, width = keys(key), config.width
        self.q = Linear(width, width, key=next(rng), axes=("heads", "embed"))
        self.k = Linear(width, width, key=next(rng), axes=("heads", "embed"))
        self.v = Linear(width, width, key=next(rng), axes=("heads", "embed"))
        self.out = Linear(width, width, key=next(rng), axes=("embed", "heads"))
        self.q_norm = RMSNorm(config.head_width, eps=config.eps)
        self.k_norm = RMSNorm(config.head_width, eps=config.eps)
        self.heads, self.head_width = config.heads, config.head_width

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rotation: tuple[Float[Array, "B S K"], Float[Array, "B S K"]],
        visible_until: np.ndarray | None,
        key_valid: Bool[AnyArray, "B A"],
        past: tuple[Float[Array, "B P H K"], Float[Array, "B P H K"]] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]]:
        """Returns the output and this call's (keys, values); those in `past` precede them."""
        heads = (*x_BSD.shape[:2], self.heads, self.head_width)
        names = ("batch", "sequence", "act_heads", None)
        q_BSHK, k_BSHK, v_BSHK = (
            named(execution.constrain(layer(x_BSD).reshape(heads), names), PROJECTIONS)
            for layer in (self.q, self.k, self.v)
        )
        q_BSHK = execution.constrain(sequence.rotate(self.q_norm(q_BSHK), rotation), names)
        k_BSHK = execution.constrain(sequence.rotate(self.k_norm(k_BSHK), rotation), names)
        all_k, all_v = k_BSHK, v_BSHK
        if past is not None:
            all_k, all_v = (jnp.concatenate(pair, axis=1) for pair in zip(past, (k_BSHK, v_BSHK), strict=True))
        y = attention(
            q_BSHK, all_k, all_v, visible_until=visible_until, key_valid_BT=key_valid, kernel=execution.kernel
        )
        y = execution.constrain(y, names)
        return named(self.out(y.reshape((*x_BSD.shape[:2], -1))), PROJECTIONS), (k_BSHK, v_BSHK)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng, width, hidden = keys(key), config.width, config.width * config.mlp_ratio
        self.up = Linear(width, hidden, key=next(rng), axes=("mlp", "embed"))
        self.gate = Linear(width, hidden, key=next(rng), axes=("mlp", "embed"))
        self.down = Linear(hidden, width, key=next(rng), axes=("embed", "mlp"))

    @jax.named_scope("mlp")
    def __call__(self, x_BSD: Float[Array, "B S D"], execution: Execution) -> Float[Array, "B S D"]:
        names = ("batch", "sequence", "act_mlp")
        gate = named(execution.constrain(self.gate(x_BSD), names), GATE)
        up = named(execution.constrain(self.up(x_BSD), names), HIDDEN)
        return named(self.down(jax.nn.silu(gate) * up), PROJECTIONS)


class Block(nnx.Module):
    """`x += tanh(g1) Attn((1 + s1) LN(x)); x += tanh(g2) SwiGLU((1 + s2) LN(x))`; the norms have no weights."""

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng = keys(key)
        self.attn = Attention(config, key=next(rng))
        self.mlp = SwiGLU(config, key=next(rng))
        self.eps = config.eps

    @jax.named_scope("mmdit/block")
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        modulation: Sequence[Float[Array, "B #S D"]],
        rotation: tuple[Float[Array, "B S K"], Float[Array, "B S K"]],
        visible_until: np.ndarray | None,
        key_valid: Bool[AnyArray, "B A"],
        past: tuple[Float[Array, "B P H K"], Float[Array, "B P H K"]] | None,
        execution: Execution,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]]:
        scale1, gate1, scale2, gate2 = modulation
        y, kept = self.attn(
            standardize(x_BSD, self.eps) * (1 + scale1), rotation, visible_until, key_valid, past, execution
        )
        x_BSD = x_BSD + jnp.tanh(gate1) * y
        x_BSD = x_BSD + jnp.tanh(gate2) * self.mlp(standardize(x_BSD, self.eps) * (1 + scale2), execution)
        return execution.constrain(x_BSD, ("batch", "sequence", "act_embed")), kept


class TextIn(nnx.Module):
    """Projects text features: zero-centred RMSNorm, Linear, GELU(tanh), Linear."""

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng = keys(key)
        self.norm = RMSNorm(config.text_width, eps=config.eps, offset=1.0)
        self.up = Linear(config.text_width, config.width, key=next(rng), axes=("heads", "embed"))
        self.down = Linear(config.width, config.width, key=next(rng), axes=("embed", "heads"))

    @jax.named_scope("mmdit/text_in")
    def __call__(self, text_BTE: Float[AnyArray, "B T E"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.gelu(self.up(self.norm(text_BTE)), approximate=True))


class TimeIn(nnx.Module):
    """Time in [0, 1] -> sinusoids (cosines first) of 1000 t with period 1e4 -> Linear, SiLU, Linear; all in fp32."""

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng = keys(key)
        self.up = Linear(TIME_FEATURES, config.width, key=next(rng), axes=("heads", None))
        self.down = Linear(config.width, config.width, key=next(rng), axes=("embed", "heads"))

    @jax.named_scope("time_in")
    def __call__(self, t_B: Float[Array, "B"]) -> Float[Array, "B D"]:
        half = TIME_FEATURES // 2
        # 1000 t amplifies an error of one ulp to 1e-4. Round once, as in the training of the published weights.
        exponents = np.float32(-np.log(TIME_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
        frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
        angles = TIME_FACTOR * t_B.astype(jnp.float32)[:, None] * frequencies
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.down(jax.nn.silu(self.up(features)))


class MMDiT(nnx.Module):
    """Predicts the velocity `noise - data` of the target latents.

    Initialisation follows DiT (Peebles & Xie, 2023): the modulation and the output projection start at zero, so that
    every block starts as the identity and the first prediction is zero.
    """

    def __init__(self, config: MMDiTConfig, *, key: Array):
        rng, width = keys(key), config.width
        self.config = config
        self.image_in = Linear(config.latent_channels, width, key=next(rng), axes=("embed", None))
        self.text_in = TextIn(config, key=next(rng))
        self.time_in = TimeIn(config, key=next(rng))
        self.modulation = Linear(width, 4 * width, key=next(rng), axes=("heads", "embed"), gain=0.0)
        self.blocks = stacked(lambda sub: Block(config, key=sub), config.layers, next(rng))
        self.final_modulation = Linear(width, width, key=next(rng), axes=("heads", "embed"), gain=0.0)
        self.image_out = Linear(width, config.latent_channels, key=next(rng), axes=(None, "embed"), gain=0.0)

    def __call__(
        self,
        layout: sequence.Layout,
        target_BNC: Float[Array, "B N C"],
        t_B: Float[Array, "B"],
        cond: Conditioning,
        execution: Execution = Execution(),
    ) -> Float[Array, "B N C"]:
        """Velocity of the noisy target at time t (1 is noise, 0 is data), in fp32; undefined at padding."""
        is_target = np.arange(layout.length) >= layout.prefix
        x_BSD = sequence.join(layout, *self._prefix_parts(cond, execution), self._latents_in(target_BNC, execution))
        modulate, scale = self._modulate(t_B, is_target, execution)
        x_BSD, _ = self._run_blocks(
            x_BSD,
            modulate,
            cond.positions_BS3,
            layout.visible_until(self.config.attention),
            cond.valid_BS,
            None,
            execution,
        )
        return self._read_out(x_BSD[:, layout.prefix :], scale if scale.shape[1] == 1 else scale[:, layout.prefix :])

    def prefill(
        self,
        layout: sequence.Layout,
        cond: Conditioning,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, "L B P H K"], Float[Array, "L B P H K"]]:
        """Keys and values of the prefix for `decode`; they do not depend on t.

        Raises:
          ValueError: if the configuration lets the prefix depend on the target or on t.
        """
        if self.config.condition_timestep != "zero" or self.config.attention != sequence.BLOCK_CAUSAL:
            raise ValueError(
                "prefix keys and values depend on the sampled t unless condition_timestep is 'zero' and attention is "
                f"'block_causal'; this model has {self.config.condition_timestep!r} and {self.config.attention!r}"
            )
        prefix = layout.prefix
        x_BPD = sequence.join(layout, *self._prefix_parts(cond, execution), None)
        modulate, _ = self._modulate(jnp.zeros(x_BPD.shape[0]), np.zeros(prefix, bool), execution)
        _, kept = self._run_blocks(
            x_BPD,
            modulate,
            cond.positions_BS3[:, :prefix],
            layout.visible_until(self.config.attention)[:prefix],
            cond.valid_BS[:, :prefix],
            None,
            execution,
            keep=True,
        )
        assert kept is not None
        return kept

    def decode(
        self,
        layout: sequence.Layout,
        target_BNC: Float[Array, "B N C"],
        t_B: Float[Array, "B"],
        cond: Conditioning,
        past: tuple[Float[Array, "L B P H K"], Float[Array, "L B P H K"]],
        execution: Execution = Execution(),
    ) -> Float[Array, "B N C"]:
        """As `__call__`, but computes only the target tokens, with keys and values of the prefix from `prefill`."""
        prefix = layout.prefix
        modulate, scale = self._modulate(t_B, np.ones(layout.target, bool), execution)
        x_BND, _ = self._run_blocks(
            self._latents_in(target_BNC, execution),
            modulate,
            cond.positions_BS3[:, prefix:],
            None,
            cond.valid_BS,
            past,
            execution,
        )
        return self._read_out(x_BND, scale)

    def _prefix_parts(self, cond: Conditioning, execution: Execution) -> tuple[Array, Array | None]:
        text = self.text_in(cond.text_BTE.astype(execution.dtype))
        conditions = None if cond.conditions_BMC is None else self._latents_in(cond.conditions_BMC, execution)
        return text, conditions

    @jax.named_scope("mmdit/image_in")
    def _latents_in(self, latents_BNC: Float[AnyArray, "B N C"], execution: Execution) -> Float[Array, "B N D"]:
        return self.image_in(latents_BNC.astype(execution.dtype))

    def _modulate(
        self, t_B: Float[Array, "B"], is_target: Bool[np.ndarray, "S"], execution: Execution
    ) -> tuple[Callable[[], list[Float[Array, "B #S D"]]], Float[Array, "B #S D"]]:
        """A function that returns the four block modulations, and the final scale: [B, S or 1, D] each.

        Target tokens are modulated with t, all others with t = 0. Each block calls the function, so that the backward
        pass keeps one row per t instead of one per token, and sums the gradients of tokens and blocks in fp32.
        """

        @jax.named_scope("mmdit/modulation")
        def project(t: Float[Array, "B"]) -> list[Float[Array, "B 1 _"]]:
            time = jax.nn.silu(self.time_in(t))
            values = self.modulation(time)[:, None], self.final_modulation(time)[:, None]
            return [execution.constrain(value, ("batch", "sequence", "act_embed")) for value in values]

        @jax.named_scope("mmdit/modulation")
        def choose(value: Float[Array, "B 1 _"], at_zero: Float[Array, "1 1 _"] | None) -> Float[Array, "B #S _"]:
            return (value if at_zero is None else jnp.where(is_target[None, :, None], value, at_zero)).astype(
                execution.dtype
            )

        zero_matters = self.config.condition_timestep == "zero" and not is_target.all()
        (blocks, final), (blocks_0, final_0) = project(t_B), project(jnp.zeros(1)) if zero_matters else (None, None)
        # Split before the choice: four arrays of [B, S, D] are fused into what uses them, one of [B, S, 4 D] is not.
        parts = [None] * 4 if blocks_0 is None else jnp.split(blocks_0, 4, axis=-1)
        pairs = list(zip(jnp.split(blocks, 4, axis=-1), parts, strict=True))
        return lambda: [choose(*pair) for pair in pairs], choose(final, final_0)

    def _run_blocks(
        self,
        x: Float[Array, "B S D"],
        modulate: Callable[[], list[Float[Array, "B #S D"]]],
        positions: Int[AnyArray, "B S 3"],
        visible_until: np.ndarray | None,
        key_valid: Bool[AnyArray, "B A"],
        past: tuple[Float[Array, "L B P H K"], Float[Array, "L B P H K"]] | None,
        execution: Execution,
        keep: bool = False,
    ) -> tuple[Float[Array, "B S D"], tuple[Float[Array, "L B S H K"], Float[Array, "L B S H K"]] | None]:
        rotation = sequence.rotations(positions, self.config.rope_dims, ROPE_THETA)

        def body(x: Float[Array, "B S D"], layer: tuple[Block, Any]) -> tuple[Float[Array, "B S D"], Any]:
            block, past = layer
            x = named(x, INPUT)
            x, kept = execution.gather(block)(x, modulate(), rotation, visible_until, key_valid, past, execution)
            return x, kept if keep else None

        x = execution.constrain(x, ("batch", "sequence", "act_embed"))
        run = recomputed(body, execution.keep) if execution.remat else body
        return jax.lax.scan(run, x, (self.blocks, past), unroll=execution.unroll)

    @jax.named_scope("mmdit/read_out")
    def _read_out(self, x_BND: Float[Array, "B N D"], scale: Float[Array, "B #N D"]) -> Float[Array, "B N C"]:
        y = standardize(x_BND, self.config.eps) * (1 + scale)
        return self.image_out(y).astype(jnp.float32)
