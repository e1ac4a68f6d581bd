"""VGG16's convolutional layers, which serve as frozen features of images.

Configuration D of Simonyan and Zisserman (arXiv 1409.1556, table 1) without its fully connected layers: five blocks of
3x3 convolutions with ReLU, and a 2x2 max pooling between two blocks. Weights have PyTorch's orientation, so exchange
with torchvision is renaming.

Dims: `B` batch, `H` `W` pixels, `C` channels; every tap has its own height, width and number of channels.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray, keys
from qi2_jax.models.vae_blocks import Conv2d

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five blocks as published
DEPTHS = (2, 2, 3, 3, 3)  # convolutions of the five blocks
MIN_SIDE = 1 << (len(DEPTHS) - 1)  # pixels: a smaller image has no pixel left in the last block


class VGG16(nnx.Module):
    """Thirteen convolutions; `taps` names what `__call__` returns.

    Args:
      widths: channels of the five blocks; other values than `WIDTHS` are for tests.
    """

    taps = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")

    def __init__(self, widths: Sequence[int] = WIDTHS, *, key: Array):
        if len(widths) != len(DEPTHS) or min(widths) < 1:
            raise ValueError(f"the widths of VGG16 are {tuple(widths)}; they must be {len(DEPTHS)} positive numbers")
        rng = keys(key)
        dims = [3, *itertools.chain.from_iterable([width] * depth for width, depth in zip(widths, DEPTHS, strict=True))]
        gain = 2**0.5  # keeps the variance through ReLU (arXiv 1502.01852)
        self.convs = nnx.List([Conv2d(a, b, 3, key=next(rng), gain=gain) for a, b in itertools.pairwise(dims)])

    @jax.named_scope("vgg16")
    def __call__(
        self, x_BHWc: Float[AnyArray, "B H W 3"], *, remat: bool = False
    ) -> tuple[Float[Array, "B _ _ _"], ...]:
        """The output of the last ReLU of every block, at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution (rounded down).

        Args:
          x_BHWc: RGB images, normalised as the weights expect it, with sides of at least `MIN_SIDE` pixels.
          remat: the backward pass computes each block again from its input.
        """
        if min(x_BHWc.shape[1:3]) < MIN_SIDE:
            raise ValueError(f"images are {x_BHWc.shape[1:3]} pixels; VGG16 needs sides of at least {MIN_SIDE}")
        convs, outputs, x = iter(self.convs), [], jnp.asarray(x_BHWc)
        for block, depth in enumerate(DEPTHS):
            run = functools.partial(_block, list(itertools.islice(convs, depth)), pool=block > 0)
            x = jax.checkpoint(run)(x) if remat else run(x)
            outputs.append(x)
        return tuple(outputs)


def _block(convs: Sequence[Conv2d], x: Float[Array, "B H W C"], *, pool: bool) -> Float[Array, "B _ _ _"]:
    x = _max_pool(x) if pool else x
    for conv in convs:
        x = jax.nn.relu(conv(x))
    return x


def _max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Maximum of each 2x2 patch; an odd last row or column is dropped, as in PyTorch."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
