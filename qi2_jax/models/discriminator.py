"""The discriminator of patches from pix2pix (arXiv 1611.07004), with three layers that halve the resolution.

It has the convolutions of the `NLayerDiscriminator` with which latent diffusion and VA-VAE train their autoencoders,
and group norm instead of batch norm. Batch norm would judge an image by the others of its batch, which differ between
images and reconstructions, and it would need running means beside the trained parameters. With group norm, every image
is judged alone: on any number of devices and hosts, and without statistics to exchange or to store.

Dims: `B` batch, `H` `W` height and width, `H2` `W2` those of the output, `h` `w` rows and columns of patches, `C` input
and `O` output channels, `G` groups of `D` channels.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray, keys
from qi2_jax.models.vae_blocks import Conv2d

HALVINGS = 3
KERNEL = 4
SLOPE = 0.2  # of the leaky ReLU, below zero
INITIAL_STD = 0.02  # of the weights, as in pix2pix
MAX_GROUPS = 32
EPSILON = 1e-5
MIN_SIDE = 24  # pixels; smaller images have no patch


class PatchConv(Conv2d):
    """Convolution of kernel 4 with a padding of 1 on all sides, initialised as in pix2pix."""

    padding = ((1, 1), (1, 1))

    def __init__(self, in_dim: int, out_dim: int, *, stride: int, key: Array):
        gain = INITIAL_STD * (in_dim * KERNEL**2) ** 0.5
        super().__init__(in_dim, out_dim, KERNEL, key=key, stride=stride, gain=gain)


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over each group of channels of an image, in fp32, then a scale and a bias."""

    def __init__(self, dim: int, groups: int):
        self.weight = nnx.Param(jnp.ones((dim,)), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((dim,)), axes=(None,))
        self.groups = groups

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        x_BHWGD = x.astype(jnp.float32).reshape(B, H, W, self.groups, C // self.groups)
        mean = jnp.mean(x_BHWGD, axis=(1, 2, 4), keepdims=True)
        variance = jnp.var(x_BHWGD, axis=(1, 2, 4), keepdims=True)
        y = ((x_BHWGD - mean) * jax.lax.rsqrt(variance + EPSILON)).reshape(B, H, W, C)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class PatchDiscriminator(nnx.Module):
    """Judges overlapping patches of 70 x 70 pixels of RGB images in [-1, 1], in the dtype of the images.

    Args:
      width: channels of the first layer; the last one has eight times as many.
    """

    def __init__(self, width: int, *, key: Array):
        rng = keys(key)
        dims = [3] + [width * 2**number for number in range(HALVINGS + 1)]
        strides = [2] * HALVINGS + [1]
        self.convs = nnx.List(
            [
                PatchConv(*pair, stride=stride, key=next(rng))
                for pair, stride in zip(itertools.pairwise(dims), strides, strict=True)
            ]
        )
        self.norms = nnx.List([GroupNorm(dim, math.gcd(MAX_GROUPS, width)) for dim in dims[2:]])
        self.conv_out = PatchConv(dims[-1], 1, stride=1, key=next(rng))

    @jax.named_scope("discriminator")
    def __call__(self, images: Float[AnyArray, "B H W 3"]) -> Float[Array, "B h w"]:
        """A logit for each patch, in fp32: above 0 for an image, below 0 for a reconstruction."""
        x = jax.nn.leaky_relu(self.convs[0](images), SLOPE)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)[..., 0].astype(jnp.float32)
