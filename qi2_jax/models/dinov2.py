"""DINOv2 (Oquab et al., arXiv 2304.07193): a vision transformer whose features are compared with latents.

Optionally with register tokens (Darcet et al., arXiv 2309.16588). Layers are stacked. Computes what `Dinov2Model` and
`Dinov2WithRegistersModel` of transformers compute; `qi2_jax.interop.dinov2` has the published names.

The model is frozen. Pass it to a compiled program as an argument: as constants, its weights would be folded by XLA for
minutes.

Dims: `B` batch, `H` `W` pixels, `h` `w` patches along height and width, `S` tokens (class, registers, patches),
`D` width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.attention import attention
from qi2_jax.models.clip import ACTIVATIONS, MLP, PatchEmbedding
from qi2_jax.models.layers import AnyArray, LayerNorm, Linear, keys, stacked

PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"  # model_type in config.json
# Tokens up to which attention keeps the whole matrix of scores. An image of 896 x 896 pixels, whose features belong to
# latents of 1024 x 1024 pixels, needs 1 GiB for the 16 heads of DINOv2-L.
WHOLE_SCORES = 4_200
MAX_SIZE = 1 << 16  # of any size in a configuration
# ImageNet's mean and standard deviation for images in [0, 1], as in the published `preprocessor_config.json`.
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The part of the published configuration that affects the computation.

    Attributes:
      width, layers, heads: of the transformer.
      hidden: width of the feed-forward network; `swiglu` says which one.
      activation: that of the network without SwiGLU.
      grid: patches along each side of the images whose positions were learned.
      registers: number of register tokens.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    swiglu: bool
    qkv_bias: bool
    eps: float
    grid: int
    patch: int
    registers: int

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "layers", "heads", "hidden", "grid", "patch")}
        if wrong := {name: size for name, size in sizes.items() if type(size) is not int or not 0 < size <= MAX_SIZE}:
            raise ValueError(f"the sizes {wrong} of a DINOv2 must be integers in 1..{MAX_SIZE}")
        if type(self.registers) is not int or not 0 <= self.registers <= MAX_SIZE:
            raise ValueError(f"a DINOv2 has {self.registers!r} registers; it must be an integer in 0..{MAX_SIZE}")
        if self.width % self.heads:
            raise ValueError(f"the width {self.width} of a DINOv2 must be a multiple of its {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; supported are {sorted(ACTIVATIONS)}")
        if not (type(self.eps) in (int, float) and 0 <= self.eps < 1):
            raise ValueError(f"layer_norm_eps is {self.eps!r}; it must be a number in [0, 1)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a `config.json` of transformers.

        Raises:
          ValueError: for another model type, other than 3 channels, images or patches that are not square, or missing
            or invalid values.
        """
        kind = values.get("model_type")
        if kind not in (PLAIN, REGISTERS):
            raise ValueError(f"model_type {kind!r} is not supported, only {PLAIN!r} and {REGISTERS!r}")
        # Defaults of transformers, which omits values that equal them in older files.
        defaults: dict[str, Any] = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "mlp_ratio": 4,
        }
        defaults |= {"hidden_act": "gelu", "use_swiglu_ffn": False, "qkv_bias": True, "layer_norm_eps": 1e-6}
        defaults |= {"image_size": 224, "patch_size": 14 if kind == PLAIN else 16, "num_channels": 3}
        found = defaults | {"num_register_tokens": 4} | dict(values)
        if found["num_channels"] != 3:
            raise ValueError(f"num_channels is {found['num_channels']!r}; only DINOv2 for RGB images is supported")
        for name in ("hidden_size", "mlp_ratio"):
            if type(found[name]) not in (int, float):
                raise ValueError(f"{name} is {found[name]!r}; it must be a number")
        try:
            patch, hidden = _side(found["patch_size"]), int(found["hidden_size"] * found["mlp_ratio"])
            return cls(
                width=found["hidden_size"],
                layers=found["num_hidden_layers"],
                heads=found["num_attention_heads"],
                # SwiGLU has three matrices instead of two: two thirds of the width, rounded up to a multiple of 8.
                hidden=-(-int(hidden * 2 / 3) // 8) * 8 if found["use_swiglu_ffn"] else hidden,
                activation=found["hidden_act"],
                swiglu=bool(found["use_swiglu_ffn"]),
                qkv_bias=bool(found["qkv_bias"]),
                eps=found["layer_norm_eps"],
                grid=_side(found["image_size"]) // patch,
                patch=patch,
                registers=found["num_register_tokens"] if kind == REGISTERS else 0,
            )
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"the configuration of a DINOv2 has values that do not fit: {error}") from None


def _side(size: Any) -> int:
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise ValueError(f"{size!r} is not the side of a square image or patch in pixels")
    return size


class Attention(nnx.Module):
    """Multi-head attention over all tokens."""

    def __init__(self, config: Dinov2Config, *, key: Array):
        rng, width, bias = keys(key), config.width, config.qkv_bias
        self.query, self.key, self.value = (
            Linear(width, width, key=next(rng), axes=("heads", "embed"), bias=bias) for _ in range(3)
        )
        self.output = Linear(width, width, key=next(rng), axes=("embed", "heads"), bias=True)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        shape = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (project(x).reshape(shape) for project in (self.query, self.key, self.value))
        kernel = "reference" if x.shape[1] <= WHOLE_SCORES else "chunked"
        return self.output(attention(q, k, v, kernel=kernel).reshape(x.shape))


class SwiGLU(nnx.Module):
    """`silu(a) * b` between two linear layers, where a and b are the halves of the first one's output."""

    def __init__(self, config: Dinov2Config, *, key: Array):
        rng = keys(key)
        self.weights_in = Linear(config.width, 2 * config.hidden, key=next(rng), axes=("mlp", "embed"), bias=True)
        self.weights_out = Linear(config.hidden, config.width, key=next(rng), axes=("embed", "mlp"), bias=True)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate, up = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """Pre-norm transformer block; a learned scale per channel multiplies each residual branch."""

    def __init__(self, config: Dinov2Config, *, key: Array):
        rng = keys(key)
        self.norm1, self.norm2 = (LayerNorm(config.width, eps=config.eps) for _ in range(2))
        self.attention = Attention(config, key=next(rng))
        key_mlp = next(rng)
        self.mlp = (
            SwiGLU(config, key=key_mlp)
            if config.swiglu
            else MLP(config.width, config.hidden, config.activation, key=key_mlp)
        )
        self.scale1, self.scale2 = (nnx.Param(jnp.ones((config.width,)), axes=(None,)) for _ in range(2))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + self.attention(self.norm1(x)) * self.scale1[...].astype(x.dtype)
        return x + self.mlp(self.norm2(x)) * self.scale2[...].astype(x.dtype)


class Dinov2(nnx.Module):
    """Images to tokens: `hidden_state` returns those of any layer, `feature_map` those of the patches as a map.

    Computes in the dtype of its input.
    """

    def __init__(self, config: Dinov2Config, *, key: Array):
        rng, width = keys(key), config.width
        self.patches = PatchEmbedding(width, config.patch, bias=True, key=next(rng))

        def tokens(count: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(next(rng), (1, count, width)), axes=(None, None, "embed"))

        self.class_token, self.positions = tokens(1), tokens(1 + config.grid**2)
        self.registers = tokens(config.registers) if config.registers else None
        self.layers = stacked(lambda k: Layer(config, key=k), config.layers, next(rng))
        self.norm = LayerNorm(width, eps=config.eps)
        self.config = config

    @jax.named_scope("dinov2")
    def hidden_state(self, pixels_BHWc: Float[AnyArray, "B H W 3"], layer: int | None = None) -> Float[Array, "B S D"]:
        """Tokens after a layer, without the final norm: transformers' `hidden_states[layer]`.

        Args:
          pixels_BHWc: RGB, normalised by `normalize`. Rows and columns beyond a multiple of the patch are ignored.
          layer: number of layers to run, from 0 (embeddings); None: all of them and the final norm, transformers'
            `last_hidden_state`.

        Raises:
          ValueError: for a layer that the model does not have, or images that are smaller than a patch.
        """
        count = self.config.layers if layer is None else layer
        if not 0 <= count <= self.config.layers:
            raise ValueError(f"layer is {layer}; this DINOv2 has the layers 0 to {self.config.layers}")

        # Selecting the layer in the loop reads the weights where they are; a slice of the stack would copy them.
        def run(x: Float[Array, "B S D"], index: Array) -> tuple[Float[Array, "B S D"], None]:
            return jax.tree.map(lambda leaf: leaf[index], self.layers)(x), None

        x_BSD = jax.lax.scan(run, self._embed(pixels_BHWc), jnp.arange(count))[0]
        return self.norm(x_BSD) if layer is None else x_BSD

    def feature_map(self, pixels_BHWc: Float[AnyArray, "B H W 3"], layer: int | None = None) -> Float[Array, "B h w D"]:
        """The patch tokens of `hidden_state` in their places."""
        h, w = (side // self.config.patch for side in pixels_BHWc.shape[1:3])
        patches_BSD = self.hidden_state(pixels_BHWc, layer)[:, 1 + self.config.registers :]
        return patches_BSD.reshape(patches_BSD.shape[0], h, w, -1)

    def _embed(self, pixels_BHWc: Float[AnyArray, "B H W 3"]) -> Float[Array, "B S D"]:
        """Class token, registers and patches, with positions added to all but the registers."""
        side, grid = self.config.patch, self.config.grid
        h, w = (length // side for length in pixels_BHWc.shape[1:3])
        if min(h, w) < 1:
            raise ValueError(
                f"images are {pixels_BHWc.shape[1:3]} pixels; DINOv2 needs at least {side} along each side"
            )
        x = self.patches(jnp.asarray(pixels_BHWc)[:, : h * side, : w * side])
        positions = self.positions[...].astype(jnp.float32)
        learned = positions[0, 1:].reshape(grid, grid, -1)
        antialias = self.config.registers > 0  # as published: only the models with registers
        rows, columns = (bicubic_weights(grid, count, antialias=antialias) for count in (h, w))
        placed = jnp.einsum("yi,xj,ijd->yxd", rows, columns, learned, precision="highest").reshape(1, h * w, -1)
        x = x + placed.astype(x.dtype)
        first = (self.class_token[...] + positions[:, :1]).astype(x.dtype)
        leading = [first] if self.registers is None else [first, self.registers[...].astype(x.dtype)]
        return jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in leading), x], axis=1)


def normalize(images_BHWc: Float[AnyArray, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """What DINOv2 expects, from RGB images in [-1, 1]."""
    x = jnp.asarray(images_BHWc)
    return ((x + 1) / 2 - MEAN.astype(x.dtype)) / STD.astype(x.dtype)


def bicubic_weights(source: int, target: int, *, antialias: bool) -> Float[np.ndarray, "target source"]:
    """The matrix that resizes one dim as PyTorch's bicubic `interpolate` does with `align_corners=False`.

    Cubic convolution (Keys, 1981) with a = -0.75; taps beyond the border read the nearest value. With `antialias`,
    a = -0.5, the kernel widens by the factor by which the size shrinks, and taps beyond the border are left out.
    """
    scale = source / target
    centre = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    matrix = np.zeros((target, source))
    if antialias:
        width = max(scale, 1.0)
        matrix = _cubic((np.arange(source)[None] - centre) / width, -0.5)
        return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
    first = np.floor(centre).astype(int)
    for tap in range(-1, 3):
        index = np.clip(first + tap, 0, source - 1)
        matrix[np.arange(target)[:, None], index] += _cubic(first + tap - centre, -0.75)
    return matrix.astype(np.float32)


def _cubic(x: Float[np.ndarray, "target taps"], a: float) -> Float[np.ndarray, "target taps"]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
