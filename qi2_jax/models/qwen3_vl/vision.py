"""Vision tower of Qwen3-VL: image patches to visual features for the text tower.

Every image is one row of a batch, padded to a common number of patches. Patches come in merge order: the m x m patches
that become one feature are neighbours in the sequence.

Dims: `I` images, `P` patches per image, `C` numbers per patch, `M` features per image (P / m^2), `D` width of the
tower, `O` width of the text tower, `H` heads, `K` head width, `F` rotary frequencies (K / 2), `N` DeepStack taps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qi2_jax.attention import Kernel, attention
from qi2_jax.models.layers import AnyArray, Embedding, LayerNorm, Linear, keys, stacked
from qi2_jax.models.qwen3_vl.config import VisionConfig
from qi2_jax.models.qwen3_vl.inputs import VisionInputs
from qi2_jax.models.qwen3_vl.rotary import frequencies, rotate


class PatchProjection(nnx.Module):
    """A convolution whose kernel equals its stride: one matrix product per patch.

    The weight keeps the published shape [out, in, frames, rows, columns], which is also the order within a patch.
    """

    def __init__(self, config: VisionConfig, *, key: Array):
        shape = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        weight = jax.random.normal(key, (config.hidden_size, *shape)) * config.patch_dim**-0.5
        self.weight = nnx.Param(weight, axes=("embed", None, None, None, None))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,)), axes=("embed",))

    def __call__(self, patches_IPC: Float[Array, "I P C"]) -> Float[Array, "I P D"]:
        weight_DC = self.weight[...].reshape(self.weight.shape[0], -1)
        return jnp.einsum("ipc,dc->ipd", patches_IPC.astype(weight_DC.dtype), weight_DC) + self.bias[...]


class PatchEmbed(nnx.Module):
    """The projection, under its published name."""

    def __init__(self, config: VisionConfig, *, key: Array):
        self.proj = PatchProjection(config, key=key)


class VisionAttention(nnx.Module):
    """Self-attention over all patches of an image."""

    def __init__(self, config: VisionConfig, *, key: Array):
        rng, dim = keys(key), config.hidden_size
        self.qkv = Linear(dim, 3 * dim, key=next(rng), axes=("heads", "embed"), bias=True)
        self.proj = Linear(dim, dim, key=next(rng), axes=("embed", "heads"), bias=True)
        self.num_heads = config.num_heads

    @jax.named_scope("attention")
    def __call__(
        self,
        x_IPD: Float[Array, "I P D"],
        angles_IPF: Float[Array, "I P F"],
        valid_IP: Bool[AnyArray, "I P"],
        *,
        kernel: str | Kernel,
    ) -> Float[Array, "I P D"]:
        images, patches, width = x_IPD.shape
        qkv = self.qkv(x_IPD).reshape(images, patches, 3, self.num_heads, width // self.num_heads)
        q_IPHK, k_IPHK, v_IPHK = (qkv[:, :, part] for part in range(3))
        y_IPHK = attention(
            rotate(q_IPHK, angles_IPF), rotate(k_IPHK, angles_IPF), v_IPHK, key_valid_BT=valid_IP, kernel=kernel
        )
        return self.proj(y_IPHK.reshape(images, patches, width))


class VisionMLP(nnx.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, config: VisionConfig, *, key: Array):
        rng = keys(key)
        self.linear_fc1 = Linear(
            config.hidden_size, config.intermediate_size, key=next(rng), axes=("mlp", "embed"), bias=True
        )
        self.linear_fc2 = Linear(
            config.intermediate_size, config.hidden_size, key=next(rng), axes=("embed", "mlp"), bias=True
        )

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "I P D"]) -> Float[Array, "I P D"]:
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=True))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, key: Array):
        rng = keys(key)
        self.norm1, self.norm2 = LayerNorm(config.hidden_size), LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config, key=next(rng))
        self.mlp = VisionMLP(config, key=next(rng))

    @jax.named_scope("block")
    def __call__(
        self,
        x_IPD: Float[Array, "I P D"],
        angles_IPF: Float[Array, "I P F"],
        valid_IP: Bool[AnyArray, "I P"],
        *,
        kernel: str | Kernel,
    ) -> Float[Array, "I P D"]:
        x_IPD = x_IPD + self.attn(self.norm1(x_IPD), angles_IPF, valid_IP, kernel=kernel)
        return x_IPD + self.mlp(self.norm2(x_IPD))


class PatchMerger(nnx.Module):
    """Joins the m x m patches of a feature and maps them to the width of the text tower.

    The last block's output is normalised patch by patch, DeepStack taps after joining (`norm_joined`).
    """

    def __init__(self, config: VisionConfig, *, norm_joined: bool, key: Array):
        rng, joined = keys(key), config.hidden_size * config.spatial_merge_size**2
        self.norm = LayerNorm(joined if norm_joined else config.hidden_size)
        self.linear_fc1 = Linear(joined, joined, key=next(rng), axes=("mlp", "embed"), bias=True)
        self.linear_fc2 = Linear(joined, config.out_hidden_size, key=next(rng), axes=("embed", "mlp"), bias=True)
        self.joined, self.norm_joined = joined, norm_joined

    @jax.named_scope("merger")
    def __call__(self, x_IPD: Float[Array, "I P D"]) -> Float[Array, "I M O"]:
        join = x_IPD.shape[0], -1, self.joined
        x = self.norm(x_IPD.reshape(join)) if self.norm_joined else self.norm(x_IPD).reshape(join)
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches to features, computed in the dtype of the patch projection's weight."""

    def __init__(self, config: VisionConfig, *, key: Array):
        rng = keys(key)
        self.patch_embed = PatchEmbed(config, key=next(rng))
        self.pos_embed = Embedding(
            config.num_position_embeddings, config.hidden_size, key=next(rng), axes=(None, "embed")
        )
        self.blocks = stacked(lambda k: VisionBlock(config, key=k), config.depth, next(rng))
        self.merger = PatchMerger(config, norm_joined=False, key=next(rng))
        self.deepstack_merger_list = stacked(
            lambda k: PatchMerger(config, norm_joined=True, key=k), len(config.deepstack_visual_indexes), next(rng)
        )
        self.config = config

    @jax.named_scope("qwen3_vl/vision")
    def __call__(
        self, inputs: VisionInputs, *, kernel: str | Kernel = "auto"
    ) -> tuple[Float[Array, "I M O"], Float[Array, "N I M O"]]:
        """Features of the last block, and of the DeepStack taps in the order of their blocks.

        Rows of padding are finite but meaningless.
        """
        x_IPD = self.patch_embed.proj(inputs.patches)
        corners_IP4D = self.pos_embed(inputs.table_index).astype(jnp.float32)
        x_IPD = x_IPD + jnp.einsum("ipfd,ipf->ipd", corners_IP4D, inputs.table_weight).astype(x_IPD.dtype)
        angles_IPF = axial_angles(inputs.coordinates, self.config)

        indexes = self.config.deepstack_visual_indexes
        tap_of_block = np.full(self.config.depth, len(indexes))  # one past the end: nothing is stored
        tap_of_block[list(indexes)] = np.arange(len(indexes))

        def body(
            carry: tuple[Float[Array, "I P D"], Float[Array, "N I P D"]],
            block_and_tap: tuple[VisionBlock, Int[AnyArray, ""]],
        ) -> tuple[tuple[Float[Array, "I P D"], Float[Array, "N I P D"]], None]:
            (x, taps), (block, tap) = carry, block_and_tap
            x = block(x, angles_IPF, inputs.valid, kernel=kernel)
            return (x, taps.at[tap].set(x, mode="drop")), None

        taps_NIPD = jnp.zeros((len(indexes), *x_IPD.shape), x_IPD.dtype)
        (x_IPD, taps_NIPD), _ = jax.lax.scan(body, (x_IPD, taps_NIPD), (self.blocks, tap_of_block))
        return self.merger(x_IPD), jax.vmap(lambda merger, x: merger(x))(self.deepstack_merger_list, taps_NIPD)


def axial_angles(coordinates_IP2: Int[AnyArray, "I P 2"], config: VisionConfig) -> Float[Array, "I P F"]:
    """Rotary angles, fp32 [I, P, K/2]: the first half depends on a patch's row, the second on its column."""
    freqs = frequencies(config.head_dim // 2, config.rope_theta)
    angles_IP2F = coordinates_IP2[..., None].astype(jnp.float32) * freqs
    return angles_IP2F.reshape(*angles_IP2F.shape[:2], -1)
