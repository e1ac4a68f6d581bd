"""Blocks of the image autoencoder: channel norm, residual and attention blocks, and the levels that change resolution.

A shortcut without parameters goes around all layers of a level: averages of pixels on the way down, copies on the way
up. Only the decoder's last level has none. The published weights come from a video model, whose shortcuts at some
levels also pool two frames into one. An image is the last of these two frames and the first is zero. In terms of
images, half of what such a level averages on the way down is zero, and half of the copies on the way up are dropped.

Attributes have the published names, and parameters the published shapes (a norm's `gamma` is [C, 1, 1] or
[C, 1, 1, 1]), so that exchange only renames them.

Dims: `B` batch, `H` height, `W` width, `C` channels of input, `O` of output; `H2`, `W2` size of output.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.attention import attention
from qi2_jax.models.layers import AnyArray, keys

# Number of positions up to which attention keeps the whole matrix of scores: 64 MiB for an image of 1024 x 1024 pixels.
# Such attention is sharded over the batch; the chunked kernel processes the images of a batch one by one.
WHOLE_SCORES = 4096


class Conv2d(nnx.Module):
    """Convolution with weights [O, C, kernel, kernel], computed in the dtype of its input.

    Stride 1 keeps the size, and stride 2 halves an even size. The image is padded with zeros where the kernel reaches
    beyond it; with stride 2, only after the last row and column.

    Initialised with a normal of standard deviation `gain * fan_in ** -0.5`, and the bias with `bias_std`.
    """

    padding: Any = "SAME"  # of `jax.lax.conv_general_dilated`

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int,
        *,
        key: Array,
        stride: int = 1,
        gain: float = 1.0,
        bias_std: float = 0.0,
    ):
        key_weight, key_bias = jax.random.split(key)
        shape = (out_dim, in_dim, kernel, kernel)
        std = gain * (in_dim * kernel * kernel) ** -0.5
        self.weight = nnx.Param(std * jax.random.normal(key_weight, shape), axes=("conv", None, None, None))
        self.bias = nnx.Param(bias_std * jax.random.normal(key_bias, (out_dim,)), axes=("conv",))
        self.stride = stride

    def __call__(self, x: Float[AnyArray, "B H W C"]) -> Float[Array, "B H2 W2 O"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.weight[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


class ChannelNorm(nnx.Module):
    """Root-mean-square norm over the channels of each pixel, computed in fp32 and scaled by `gamma`.

    As in the published model, the length of a pixel has a lower limit (1e-12), not its mean square. The norm is exact
    for every pixel that is not zero.
    """

    def __init__(self, dim: int, *, trailing: int = 3):
        self.gamma = nnx.Param(jnp.ones((dim,) + (1,) * trailing), axes=(None,) * (1 + trailing))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x32 = x.astype(jnp.float32)
        squared_length = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.maximum(squared_length, 1e-24)) * x.shape[-1] ** 0.5
        return (x32 * scale * self.gamma[...].reshape(-1).astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1x1 convolution of x if the number of channels changes.

    The last convolution starts at zero, so a fresh block is its shortcut and a fresh model is nearly linear. Small
    models learn faster from there than from equally scaled convolutions.
    """

    def __init__(self, in_dim: int, out_dim: int, *, key: Array):
        key1, key2, key3 = jax.random.split(key, 3)
        self.norm1 = ChannelNorm(in_dim)
        self.conv1 = Conv2d(in_dim, out_dim, 3, key=key1)
        self.norm2 = ChannelNorm(out_dim)
        self.conv2 = Conv2d(out_dim, out_dim, 3, key=key2, gain=0.0)
        self.conv_shortcut = None if in_dim == out_dim else Conv2d(in_dim, out_dim, 1, key=key3)

    @jax.named_scope("residual")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Residual self-attention over all positions, with a single head whose width is the number of channels.

    Queries, keys and values are thirds of one 1x1 convolution. The projection starts at zero, as in `ResidualBlock`.
    """

    def __init__(self, dim: int, *, key: Array):
        key1, key2 = jax.random.split(key)
        self.norm = ChannelNorm(dim, trailing=2)
        self.to_qkv = Conv2d(dim, 3 * dim, 1, key=key1)
        self.proj = Conv2d(dim, dim, 1, key=key2, gain=0.0)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        qkv_BS3C = self.to_qkv(self.norm(x)).reshape(B, H * W, 3, C)
        q, k, v = (qkv_BS3C[:, :, i : i + 1] for i in range(3))
        kernel = "reference" if H * W <= WHOLE_SCORES else "chunked"
        return x + self.proj(attention(q, k, v, kernel=kernel).reshape(B, H, W, C))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, dim: int, *, key: Array):
        key1, key2, key3 = jax.random.split(key, 3)
        self.resnets = nnx.List([ResidualBlock(dim, dim, key=key1), ResidualBlock(dim, dim, key=key2)])
        self.attentions = nnx.List([AttentionBlock(dim, key=key3)])

    @jax.named_scope("mid")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nnx.Module):
    """A level of the encoder: `count` residual blocks, and with factor 2 a convolution that halves the resolution.

    `frames` is 2 where the published level also halves time (see the top of this file), else 1.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int, frames: int, count: int, *, key: Array):
        rng = keys(key)
        dims = [in_dim] + [out_dim] * count
        self.resnets = nnx.List([ResidualBlock(a, b, key=next(rng)) for a, b in itertools.pairwise(dims)])
        self.downsampler = Conv2d(out_dim, out_dim, 3, stride=2, key=next(rng)) if factor == 2 else None
        self.out_dim, self.factor, self.frames = out_dim, factor, frames

    @jax.named_scope("down")
    def __call__(self, x: Float[Array, "B H W C"], *, remat: bool = False) -> Float[Array, "B H2 W2 O"]:
        y = x
        for block in self.resnets:
            y = recomputed(block, remat)(y)
        if self.downsampler is not None:
            y = self.downsampler(y)
        return y + average_down(x, self.out_dim, factor=self.factor, frames=self.frames)


class UpBlock(nnx.Module):
    """A level of the decoder: `count` residual blocks, and with factor 2 an upsampling and a convolution.

    The level with factor 1 has no shortcut around it. `frames` as in `DownBlock`.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int, frames: int, count: int, *, key: Array):
        rng = keys(key)
        dims = [in_dim] + [out_dim] * count
        self.resnets = nnx.List([ResidualBlock(a, b, key=next(rng)) for a, b in itertools.pairwise(dims)])
        self.upsampler = Conv2d(out_dim, out_dim, 3, key=next(rng)) if factor == 2 else None
        self.out_dim, self.frames = out_dim, frames

    @jax.named_scope("up")
    def __call__(self, x: Float[Array, "B H W C"], *, remat: bool = False) -> Float[Array, "B H2 W2 O"]:
        y = x
        for block in self.resnets:
            y = recomputed(block, remat)(y)
        if self.upsampler is None:
            return y
        return recomputed(self._upsample, remat)(y) + duplicate_up(x, self.out_dim, frames=self.frames)

    def _upsample(self, y: Float[Array, "B H W O"]) -> Float[Array, "B H2 W2 O"]:
        assert self.upsampler is not None
        return self.upsampler(double(y))


def recomputed(function: Callable[[Array], Array], remat: bool) -> Callable[[Array], Array]:
    """With `remat`, the backward pass keeps only the input of the function and computes it again."""
    return jax.checkpoint(function) if remat else function


def double(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Repeats every pixel twice along height and width (nearest-neighbour upsampling)."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def average_down(x: Float[Array, "B H W C"], out_dim: int, *, factor: int, frames: int) -> Float[Array, "B H2 W2 O"]:
    """Shortcut of an encoder level: moves pixels into channels, then averages neighbouring channels down to `out_dim`.

    Each patch of factor x factor pixels becomes the channels (C, frame, row, column), where all frames but the last
    are zero. C * frames * factor ** 2 is a multiple of `out_dim`. The shortcut follows DC-AE (arXiv 2410.10733,
    section 3.2), with the frames added by the published model.
    """
    B, H, W, C = x.shape
    h, w = H // factor, W // factor
    patches = x.reshape(B, h, factor, w, factor, C).transpose(0, 1, 3, 5, 2, 4).reshape(B, h, w, C, 1, factor * factor)
    patches = jnp.pad(patches, [(0, 0)] * 4 + [(frames - 1, 0), (0, 0)])
    return patches.reshape(B, h, w, out_dim, -1).mean(axis=-1)


def duplicate_up(x: Float[Array, "B H W C"], out_dim: int, *, frames: int) -> Float[Array, "B H2 W2 O"]:
    """Shortcut of a decoder level: repeats channels to 4 * frames * `out_dim`, then moves channels into pixels.

    The channels are read as (O, frame, row, column) and all frames but the last are dropped, the counterpart of
    `average_down`. 4 * frames * `out_dim` is a multiple of C.
    """
    B, H, W, C = x.shape
    x = jnp.repeat(x, 4 * frames * out_dim // C, axis=-1).reshape(B, H, W, out_dim, frames, 2, 2)[..., -1, :, :]
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, 2 * H, 2 * W, out_dim)


def to_patches(x: Float[AnyArray, "B H W C"], size: int) -> Float[AnyArray, "B H2 W2 O"]:
    """Squares of `size` pixels become channels, in the published order (C, column, row)."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).transpose(0, 1, 3, 5, 4, 2)
    return x.reshape(B, H // size, W // size, C * size * size)


def from_patches(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B H2 W2 O"]:
    """Inverse of `to_patches`."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, C // size**2, size, size).transpose(0, 1, 5, 2, 4, 3)
    return x.reshape(B, H * size, W * size, C // size**2)
