"""CLIP and SigLIP: an image tower and a text tower whose embeddings measure how well a text fits an image.

Parameter names are those of transformers (`CLIPModel`, `SiglipModel`); layers are stacked.
They differ in the text's mask and pooling, the vision tower's class token and pooling, and the activation.

Dims: `B` batch, `H` `W` pixels, `P` patches (and class token), `T` tokens, `S` either of the two,
`D` width of a tower, `E` embedding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qi2_jax.attention import attention
from qi2_jax.models.layers import Embedding, LayerNorm, Linear, keys, stacked

CLIP, SIGLIP = "clip", "siglip"
LEGACY_EOS = 2  # in early configurations of CLIP: the end of a text is its highest token id

ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """A pre-norm transformer."""

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    eps: float

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.hidden) < 1 or self.width % self.heads:
            raise ValueError(f"{self} is not a valid tower: sizes must be positive, and the width a multiple of heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; supported are {sorted(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """The part of the published configuration that affects the computation."""

    kind: str
    vision: TowerConfig
    text: TowerConfig
    image_size: int
    patch_size: int
    vocabulary: int
    positions: int
    embedding: int
    eos: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a `config.json` of transformers.

        Raises:
          ValueError: for another model type, or missing or invalid values.
        """
        kind = values.get("model_type")
        if kind not in (CLIP, SIGLIP):
            raise ValueError(f"model_type {kind!r} is not supported, only {CLIP!r} and {SIGLIP!r}")
        # Defaults of transformers, which omits values that equal them.
        clip = kind == CLIP
        common: dict[str, Any] = {"num_hidden_layers": 12, "image_size": 224, "layer_norm_eps": 1e-5 if clip else 1e-6}
        common["hidden_act"] = "quick_gelu" if clip else "gelu_pytorch_tanh"
        base = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        small = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        words = {"vocab_size": 49408 if clip else 32000, "max_position_embeddings": 77 if clip else 64}
        vision = common | base | {"patch_size": 32 if clip else 16} | dict(values.get("vision_config", {}))
        text = (
            common | (small if clip else base) | words | {"eos_token_id": 49407} | dict(values.get("text_config", {}))
        )
        try:
            return cls(
                kind=kind,
                vision=_tower(vision),
                text=_tower(text),
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                vocabulary=text["vocab_size"],
                positions=text["max_position_embeddings"],
                embedding=values.get("projection_dim", 512)
                if clip
                else text.get("projection_size", text["hidden_size"]),
                eos=text["eos_token_id"],
            )
        except TypeError as error:
            raise ValueError(f"the configuration of a {kind} model has values of the wrong type: {error}") from None

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def _tower(values: Mapping[str, Any]) -> TowerConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    return TowerConfig(*(values[name] for name in (*names, "layer_norm_eps")))


class Attention(nnx.Module):
    """Multi-head attention with biases."""

    def __init__(self, config: TowerConfig, *, key: Array):
        rng, width = keys(key), config.width
        axes = ("heads", "embed")
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(width, width, key=next(rng), axes=axes, bias=True) for _ in range(3)
        )
        self.out_proj = Linear(width, width, key=next(rng), axes=("embed", "heads"), bias=True)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "B S D"], *, causal: bool) -> Float[Array, "B S D"]:
        heads = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (project(x).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        visible = np.arange(1, x.shape[1] + 1) if causal else None
        return self.out_proj(attention(q, k, v, visible_until=visible).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden: int, activation: str, *, key: Array):
        rng = keys(key)
        self.fc1 = Linear(width, hidden, key=next(rng), axes=("mlp", "embed"), bias=True)
        self.fc2 = Linear(hidden, width, key=next(rng), axes=("embed", "mlp"), bias=True)
        self.activation = activation

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig, *, key: Array):
        rng = keys(key)
        self.layer_norm1, self.layer_norm2 = (LayerNorm(config.width, eps=config.eps) for _ in range(2))
        self.self_attn = Attention(config, key=next(rng))
        self.mlp = MLP(config.width, config.hidden, config.activation, key=next(rng))

    def __call__(self, x: Float[Array, "B S D"], *, causal: bool) -> Float[Array, "B S D"]:
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class Tower(nnx.Module):
    """Stacked layers."""

    def __init__(self, config: TowerConfig, *, key: Array):
        self.layers = stacked(lambda k: Layer(config, key=k), config.layers, key)

    def __call__(self, x: Float[Array, "B S D"], *, causal: bool) -> Float[Array, "B S D"]:
        return jax.lax.scan(lambda x, layer: (layer(x, causal=causal), None), x, self.layers)[0]


class PatchEmbedding(nnx.Module):
    """A convolution whose kernel equals its stride."""

    def __init__(self, width: int, side: int, *, bias: bool, key: Array):
        weight = jax.random.normal(key, (width, 3, side, side)) * (3 * side * side) ** -0.5
        self.weight = nnx.Param(weight, axes=("embed", None, None, None))
        self.bias = nnx.Param(jnp.zeros((width,)), axes=("embed",)) if bias else None

    def __call__(self, pixels_BHWc: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        B, H, W, c = pixels_BHWc.shape
        side = self.weight.shape[-1]
        patches = pixels_BHWc.reshape(B, H // side, side, W // side, side, c)
        x = jnp.einsum("byixjc,dcij->byxd", patches, self.weight[...].astype(patches.dtype))
        x = x.reshape(B, -1, x.shape[-1])
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class VisionEmbeddings(nnx.Module):
    """Patches with learned positions; CLIP puts a class token before them."""

    def __init__(self, config: DualEncoderConfig, *, key: Array):
        rng, width, has_class = keys(key), config.vision.width, config.kind == CLIP
        if has_class:
            self.class_embedding = nnx.Param(jax.random.normal(next(rng), (width,)) * 0.02, axes=("embed",))
        self.patch_embedding = PatchEmbedding(width, config.patch_size, bias=not has_class, key=next(rng))
        self.position_embedding = Embedding(config.patches + has_class, width, key=next(rng), axes=(None, "embed"))
        self.has_class = has_class

    def __call__(self, pixels_BHWc: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        x = self.patch_embedding(pixels_BHWc)
        if self.has_class:
            first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        return x + self.position_embedding.weight[...].astype(x.dtype)


class PoolingAttention(nnx.Module):
    """Attention as in PyTorch's `MultiheadAttention`, with one matrix for queries, keys and values."""

    def __init__(self, config: TowerConfig, *, key: Array):
        rng, width = keys(key), config.width
        weight = jax.random.normal(next(rng), (3 * width, width)) * width**-0.5
        self.in_proj_weight = nnx.Param(weight, axes=("heads", "embed"))
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * width,)), axes=("heads",))
        self.out_proj = Linear(width, width, key=next(rng), axes=("embed", "heads"), bias=True)
        self.heads = config.heads

    def __call__(self, query_B1D: Float[Array, "B 1 D"], x_BPD: Float[Array, "B P D"]) -> Float[Array, "B 1 D"]:
        weights = jnp.split(self.in_proj_weight[...].astype(x_BPD.dtype), 3)
        biases = jnp.split(self.in_proj_bias[...].astype(x_BPD.dtype), 3)
        q, k, v = (
            (x @ weight.T + bias).reshape(*x.shape[:2], self.heads, -1)
            for x, weight, bias in zip((query_B1D, x_BPD, x_BPD), weights, biases, strict=True)
        )
        return self.out_proj(attention(q, k, v).reshape(query_B1D.shape))


class PoolingHead(nnx.Module):
    """SigLIP's pooling: a learned query attends to all patches."""

    def __init__(self, config: TowerConfig, *, key: Array):
        rng = keys(key)
        self.probe = nnx.Param(jax.random.normal(next(rng), (1, 1, config.width)), axes=(None, None, "embed"))
        self.attention = PoolingAttention(config, key=next(rng))
        self.layernorm = LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, config.hidden, config.activation, key=next(rng))

    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x_BPD.dtype), (x_BPD.shape[0], 1, x_BPD.shape[2]))
        pooled = self.attention(probe, x_BPD)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class VisionModel(nnx.Module):
    """Pixels to one vector per image, before CLIP's projection."""

    def __init__(self, config: DualEncoderConfig, *, key: Array):
        rng, tower, self.kind = keys(key), config.vision, config.kind
        self.embeddings = VisionEmbeddings(config, key=next(rng))
        if self.kind == CLIP:
            self.pre_layrnorm = LayerNorm(tower.width, eps=tower.eps)  # spelled as published
        self.encoder = Tower(tower, key=next(rng))
        self.post_layernorm = LayerNorm(tower.width, eps=tower.eps)
        if self.kind == SIGLIP:
            self.head = PoolingHead(tower, key=next(rng))

    def __call__(self, pixels_BHWc: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        x_BPD = self.embeddings(pixels_BHWc)
        if self.kind == CLIP:
            return self.post_layernorm(self.encoder(self.pre_layrnorm(x_BPD), causal=False)[:, 0])
        return self.head(self.post_layernorm(self.encoder(x_BPD, causal=False)))


class TextEmbeddings(nnx.Module):
    """Tokens with learned positions."""

    def __init__(self, config: DualEncoderConfig, *, key: Array):
        rng, width = keys(key), config.text.width
        self.token_embedding = Embedding(config.vocabulary, width, key=next(rng), axes=("vocab", "embed"))
        self.position_embedding = Embedding(config.positions, width, key=next(rng), axes=(None, "embed"))

    def __call__(self, ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.token_embedding(ids_BT) + self.position_embedding.weight[: ids_BT.shape[1]]


class TextModel(nnx.Module):
    """Token ids to one vector per text, before CLIP's projection."""

    def __init__(self, config: DualEncoderConfig, *, key: Array):
        rng, tower, self.kind, self.eos = keys(key), config.text, config.kind, config.eos
        self.embeddings = TextEmbeddings(config, key=next(rng))
        self.encoder = Tower(tower, key=next(rng))
        self.final_layer_norm = LayerNorm(tower.width, eps=tower.eps)
        if self.kind == SIGLIP:
            self.head = Linear(tower.width, config.embedding, key=next(rng), axes=(None, "embed"), bias=True)

    def __call__(self, ids_BT: Int[Array, "B T"]) -> Float[Array, "B _"]:
        x_BTD = self.encoder(self.embeddings(ids_BT), causal=self.kind == CLIP)
        x_BTD = self.final_layer_norm(x_BTD)
        if self.kind == SIGLIP:
            return self.head(x_BTD[:, -1])
        end_B = jnp.argmax(ids_BT if self.eos == LEGACY_EOS else ids_BT == self.eos, axis=1)
        return jnp.take_along_axis(x_BTD, end_B[:, None, None], axis=1)[:, 0]


class DualEncoder(nnx.Module):
    """Both towers; `embed_images` and `embed_texts` return unit vectors, whose product is the cosine similarity.

    `logit_scale`, and for SigLIP `logit_bias`, are read with the weights: SigLIP's probability of a pair is
    sigmoid(exp(scale) cosine + bias).
    """

    def __init__(self, config: DualEncoderConfig, *, key: Array):
        rng = keys(key)
        self.vision_model = VisionModel(config, key=next(rng))
        self.text_model = TextModel(config, key=next(rng))
        if config.kind == CLIP:
            axes = (None, "embed")
            self.visual_projection = Linear(config.vision.width, config.embedding, key=next(rng), axes=axes)
            self.text_projection = Linear(config.text.width, config.embedding, key=next(rng), axes=axes)
            self.logit_scale = nnx.Param(jnp.zeros(()), axes=())
        else:
            self.logit_scale = nnx.Param(jnp.zeros((1,)), axes=(None,))
            self.logit_bias = nnx.Param(jnp.zeros((1,)), axes=(None,))
        self.config = config

    def embed_images(self, pixels_BHWc: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Unit vectors of images of the configured size, normalised as the published processor does."""
        x = self.vision_model(pixels_BHWc)
        return _unit(self.visual_projection(x) if self.config.kind == CLIP else x)

    def embed_texts(self, ids_BT: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Unit vectors of texts; those for CLIP end in its end token, those for SigLIP are padded to full length."""
        x = self.text_model(ids_BT)
        return _unit(self.text_projection(x) if self.config.kind == CLIP else x)


def _unit(x_BE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    x_BE = x_BE.astype(jnp.float32)
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)
