"""Text tower of Qwen3-VL: a causal decoder with grouped queries and interleaved three-axis rotary positions.

Dims: `B` batch, `S` tokens, `D` width, `H` query heads, `G` key-value heads, `K` head width,
`F` rotary frequencies (K / 2), `I` images, `M` features per image, `N` DeepStack taps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qi2_jax.attention import Kernel, attention
from qi2_jax.models.layers import AnyArray, Embedding, Linear, RMSNorm, keys, stacked
from qi2_jax.models.qwen3_vl.config import TextConfig
from qi2_jax.models.qwen3_vl.rotary import frequencies, rotate


class TextAttention(nnx.Module):
    """Causal attention with grouped queries; queries and keys are normalised per head before they are rotated."""

    def __init__(self, config: TextConfig, *, key: Array):
        rng, dim, width = keys(key), config.hidden_size, config.head_dim
        self.q_proj = Linear(dim, config.num_attention_heads * width, key=next(rng), axes=("heads", "embed"))
        self.k_proj = Linear(dim, config.num_key_value_heads * width, key=next(rng), axes=("heads", "embed"))
        self.v_proj = Linear(dim, config.num_key_value_heads * width, key=next(rng), axes=("heads", "embed"))
        self.o_proj = Linear(config.num_attention_heads * width, dim, key=next(rng), axes=("embed", "heads"))
        self.q_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.head_dim = width

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        angles_BSF: Float[Array, "B S F"],
        valid_BS: Bool[Array, "B S"],
        *,
        kernel: str | Kernel,
    ) -> Float[Array, "B S D"]:
        heads = *x_BSD.shape[:2], -1, self.head_dim
        q_BSHK = rotate(self.q_norm(self.q_proj(x_BSD).reshape(heads)), angles_BSF)
        k_BSGK = rotate(self.k_norm(self.k_proj(x_BSD).reshape(heads)), angles_BSF)
        y_BSHK = attention(
            q_BSHK,
            k_BSGK,
            self.v_proj(x_BSD).reshape(heads),
            visible_until=np.arange(x_BSD.shape[1]) + 1,
            key_valid_BT=valid_BS,
            kernel=kernel,
        )
        return self.o_proj(y_BSHK.reshape(*x_BSD.shape[:2], -1))


class TextMLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: TextConfig, *, key: Array):
        rng, dim, hidden = keys(key), config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(dim, hidden, key=next(rng), axes=("mlp", "embed"))
        self.up_proj = Linear(dim, hidden, key=next(rng), axes=("mlp", "embed"))
        self.down_proj = Linear(hidden, dim, key=next(rng), axes=("embed", "mlp"))

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: TextConfig, *, key: Array):
        rng = keys(key)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, key=next(rng))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TextMLP(config, key=next(rng))

    @jax.named_scope("layer")
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        angles_BSF: Float[Array, "B S F"],
        valid_BS: Bool[Array, "B S"],
        *,
        kernel: str | Kernel,
    ) -> Float[Array, "B S D"]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), angles_BSF, valid_BS, kernel=kernel)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class TextTower(nnx.Module):
    """Token embeddings and decoder layers, without the final norm."""

    def __init__(self, config: TextConfig, *, key: Array):
        rng = keys(key)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, key=next(rng), axes=("vocab", "embed"))
        self.layers = stacked(lambda k: TextLayer(config, key=k), config.num_hidden_layers, next(rng))
        self.config = config

    @jax.named_scope("qwen3_vl/text")
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_3BS: Int[Array, "3 B S"],
        valid_BS: Bool[Array, "B S"],
        slots_IM: Int[Array, "I M"] | None = None,
        taps_NIMD: Float[Array, "N I M D"] | None = None,
        *,
        kernel: str | Kernel = "auto",
    ) -> Float[Array, "B S D"]:
        """Runs the layers on embeddings that already contain the visual features.

        Args:
          x_BSD: embeddings; everything but norms, softmax and rotation is computed in their dtype.
          positions_3BS: frame, height and width position of every token.
          valid_BS: False marks padding.
          slots_IM: flat position (b * S + s) of every visual feature; B * S: none.
          taps_NIMD: DeepStack features; the n-th is added at the slots after layer n.
          kernel: attention kernel.
        """
        angles_BSF = mrope_angles(positions_3BS, self.config)

        def body(
            x_BSD: Float[Array, "B S D"], layer_and_index: tuple[TextLayer, Int[AnyArray, ""]]
        ) -> tuple[Float[Array, "B S D"], None]:
            layer, index = layer_and_index
            x_BSD = layer(x_BSD, angles_BSF, valid_BS, kernel=kernel)
            if taps_NIMD is not None and slots_IM is not None:
                # One loop over all layers with a branch inside, because splitting the stack would copy the weights.
                x_BSD = jax.lax.cond(
                    index < taps_NIMD.shape[0],
                    lambda x: place(x, slots_IM, taps_NIMD[index], add=True),
                    lambda x: x,
                    x_BSD,
                )
            return x_BSD, None

        return jax.lax.scan(body, x_BSD, (self.layers, np.arange(self.config.num_hidden_layers)))[0]


def place(
    x_BSD: Float[Array, "B S D"], slots_IM: Int[Array, "I M"], features_IMD: Float[Array, "I M D"], *, add: bool = False
) -> Float[Array, "B S D"]:
    """Writes (or adds) features at their flat positions b * S + s; features at B * S are ignored."""
    rows = x_BSD.reshape(-1, x_BSD.shape[-1]).at[slots_IM.reshape(-1)]
    update = rows.add if add else rows.set
    features = features_IMD.reshape(-1, x_BSD.shape[-1]).astype(x_BSD.dtype)
    return update(features, mode="drop").reshape(x_BSD.shape)


def frequency_axes(config: TextConfig) -> np.ndarray:
    """The position axis (0 frame, 1 height, 2 width) of each rotary frequency, [K/2].

    Interleaved layout: frequency i belongs to axis i mod 3 while i < 3 * mrope_section[axis], and otherwise to the
    frame axis (Qwen3-VL technical report, interleaved M-RoPE).
    """
    index = np.arange(config.head_dim // 2)
    axis = index % 3
    return np.where(index < 3 * np.asarray(config.mrope_section)[axis], axis, 0)


def mrope_angles(positions_3BS: Int[Array, "3 B S"], config: TextConfig) -> Float[Array, "B S F"]:
    """Rotary angles, fp32 [B, S, K/2]."""
    positions_FBS = positions_3BS[frequency_axes(config)]
    return jnp.moveaxis(positions_FBS, 0, -1).astype(jnp.float32) * frequencies(config.head_dim, config.rope_theta)
