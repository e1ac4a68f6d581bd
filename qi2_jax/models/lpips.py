"""LPIPS: a learned perceptual distance between two images (Zhang et al., arXiv 1801.03924, equation 1), on VGG16.

    d(x, y) = sum over taps l of the mean over positions of  w_l . (u_l(x) - u_l(y))^2

where u_l are VGG16's features at tap l, scaled to unit length at every position, and w_l >= 0 is the tap's head,
learned from human judgements. The authors' package `lpips` computes it as version 0.1 with `net="vgg"`.

The model is frozen. Pass it to a compiled program as an argument: as constants, its weights would be folded by XLA for
minutes.

Dims: `B` batch, `H` `W` pixels, `C` channels of a tap.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qi2_jax.models.layers import AnyArray, keys
from qi2_jax.models.vgg16 import DEPTHS, VGG16, WIDTHS

KIND, NETWORK, VERSION = "lpips", "vgg16", "0.1"
# ImageNet's mean and standard deviation for images in [-1, 1], with the rounding of the package.
SHIFT, SCALE = np.array([-0.030, -0.088, -0.188], np.float32), np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10  # added to the length of a feature vector


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """What affects the computation.

    Attributes:
      widths: channels of VGG16's five blocks; other values than the published ones are for tests.
    """

    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        if len(self.widths) != len(DEPTHS) or not all(
            type(width) is int and 0 < width <= 4096 for width in self.widths
        ):
            raise ValueError(f"widths is {self.widths!r}; it must be a list of {len(DEPTHS)} integers in 1..4096")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the `config.json` of a folder that `qi2 import` wrote.

        Raises:
          ValueError: for another network, another version, or invalid widths.
        """
        wanted = {"model_type": KIND, "network": NETWORK, "version": VERSION}
        if other := {name: values.get(name) for name in wanted if values.get(name) != wanted[name]}:
            raise ValueError(f"the configuration has {other}; supported is only {wanted}")
        widths = values.get("widths", list(WIDTHS))
        if not isinstance(widths, list):
            raise ValueError(f"widths is {widths!r}; it must be a list of {len(DEPTHS)} integers")
        return cls(tuple(widths))

    def to_dict(self) -> dict[str, Any]:
        """The values that `from_dict` reads."""
        return {"model_type": KIND, "network": NETWORK, "version": VERSION, "widths": list(self.widths)}


class LPIPS(nnx.Module):
    """The distance, and the features that it compares.

    Convolutions compute in the dtype of the images; lengths, heads and means in fp32.
    """

    def __init__(self, config: LPIPSConfig, *, key: Array):
        rng = keys(key)
        self.vgg = VGG16(config.widths, key=next(rng))
        self.heads = nnx.List(
            [nnx.Param(jax.random.uniform(next(rng), (width,)) / width, axes=(None,)) for width in config.widths]
        )
        self.config = config

    def features(
        self, images_BHWc: Float[AnyArray, "B H W 3"], *, remat: bool = False
    ) -> tuple[Float[Array, "B _ _ _"], ...]:
        """VGG16's features at its five taps, from relu1_2 at full resolution to relu5_3 at 1/16.

        Args:
          images_BHWc: RGB in [-1, 1], with sides of at least 16 pixels.
          remat: see `VGG16`.
        """
        x = jnp.asarray(images_BHWc)
        return self.vgg((x - SHIFT.astype(x.dtype)) / SCALE.astype(x.dtype), remat=remat)

    @jax.named_scope("lpips")
    def __call__(
        self, images_BHWc: Float[AnyArray, "B H W 3"], others_BHWc: Float[AnyArray, "B H W 3"], *, remat: bool = False
    ) -> Float[Array, " B"]:
        """Distance of each image to its counterpart; 0 if they are equal, about 0.7 if they have nothing in common.

        Differentiable in both arguments. If one of them is constant, its features cost no backward pass.

        Args:
          images_BHWc, others_BHWc: RGB in [-1, 1], with sides of at least 16 pixels.
          remat: the backward pass keeps only the features, and computes everything between them again.
        """
        ours, others = (self.features(images, remat=remat) for images in (images_BHWc, others_BHWc))
        return self.distance(ours, others, remat=remat)

    def distance(
        self,
        ours: tuple[Float[Array, "B _ _ _"], ...],
        others: tuple[Float[Array, "B _ _ _"], ...],
        *,
        remat: bool = False,
    ) -> Float[Array, " B"]:
        """The distance from the results of `features`, so that those of a reference can be used several times."""
        total = jnp.zeros(ours[0].shape[:1], jnp.float32)
        compare = jax.checkpoint(_compare) if remat else _compare
        for head, a, b in zip(self.heads, ours, others, strict=True):
            total += compare(head[...].astype(jnp.float32), a, b)
        return total


def _compare(head_C: Float[Array, " C"], a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    return jnp.mean((_unit(a) - _unit(b)) ** 2 @ head_C, axis=(1, 2))


def _unit(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Features with unit length at every position; the gradient is finite also where all features are zero."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(squared > 0, squared, 1))  # the square root has no derivative at 0
    return x / (jnp.where(squared > 0, length, 0) + EPSILON)
