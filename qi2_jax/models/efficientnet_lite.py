"""EfficientNet-Lite0: a small convolutional classifier for the 1,000 classes of ImageNet; inference only.

EfficientNet-B0 (Tan and Le, arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6. Every batch norm
is folded into the convolution before it, so a layer has `{name}.weight` and `{name}.bias`; the published weights are
converted by `qi2_torch.efficientnet_lite`.

Dims: `B` batch, `H` `W` pixels, `C` channels, `O` channels, `H2` `W2` pixels of a layer's output, `h` `w` kernel.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE, CLASSES = 224, 1000
MEAN, SCALE = 127.0, 128.0  # normalisation of the Lite family; other EfficientNets subtract ImageNet's mean colour
STEM, HEAD = 32, 1280
STAGES = (  # kernel, stride of the first block, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """Inverted bottleneck: 1x1 convolution to `hidden` channels, depthwise convolution, 1x1 convolution to `out`."""

    name: str
    kernel: int
    stride: int
    width: int
    hidden: int
    out: int

    @property
    def expands(self) -> bool:
        return self.hidden != self.width

    @property
    def is_residual(self) -> bool:
        return self.stride == 1 and self.width == self.out


def blocks() -> Iterator[Block]:
    """The sixteen blocks in order."""
    width, index = STEM, 0
    for kernel, stride, expansion, out, count in STAGES:
        for repeat in range(count):
            yield Block(f"blocks.{index}", kernel, 1 if repeat else stride, width, expansion * width, out)
            width, index = out, index + 1


def shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of all parameters; kernels are [out, in per group, height, width]."""
    kernels = {"stem": (STEM, 3, 3, 3)}
    for block in blocks():
        if block.expands:
            kernels[f"{block.name}.expand"] = (block.hidden, block.width, 1, 1)
        kernels[f"{block.name}.depthwise"] = (block.hidden, 1, block.kernel, block.kernel)
        kernels[f"{block.name}.project"] = (block.out, block.hidden, 1, 1)
    kernels["head"] = (HEAD, block.out, 1, 1)
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in (kernels | {"classifier": (CLASSES, HEAD)}).items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def logits(weights: Mapping[str, Array], pixels_BHWc: Float[Array, "B 224 224 3"]) -> Float[Array, "B 1000"]:
    """Logits of the ImageNet classes.

    Args:
      weights: parameters with the names and shapes of `shapes`.
      pixels_BHWc: RGB, 0..255.
    """

    def convolve(
        name: str, x: Float[Array, "B H W C"], stride: int = 1, depthwise: bool = False
    ) -> Float[Array, "B H2 W2 O"]:
        kernel, bias = (weights[f"{name}.{part}"].astype(x.dtype) for part in ("weight", "bias"))
        return (_depthwise if depthwise else _full)(x, kernel, stride) + bias

    x = jax.nn.relu6(convolve("stem", (pixels_BHWc - MEAN) / SCALE, stride=2))
    for block in blocks():
        y = jax.nn.relu6(convolve(f"{block.name}.expand", x)) if block.expands else x
        y = jax.nn.relu6(convolve(f"{block.name}.depthwise", y, block.stride, depthwise=True))
        y = convolve(f"{block.name}.project", y)
        x = x + y if block.is_residual else y
    x_BC = jnp.mean(jax.nn.relu6(convolve("head", x)), axis=(1, 2))
    return x_BC @ weights["classifier.weight"].T.astype(x.dtype) + weights["classifier.bias"].astype(x.dtype)


def _full(
    x_BHWC: Float[Array, "B H W C"], kernel_OChw: Float[Array, "O C h w"], stride: int
) -> Float[Array, "B H2 W2 O"]:
    dims = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x_BHWC, kernel_OChw, (stride, stride), "SAME", dimension_numbers=dims)


def _depthwise(
    x_BHWC: Float[Array, "B H W C"], kernel_C1hw: Float[Array, "C 1 h w"], stride: int
) -> Float[Array, "B H2 W2 C"]:
    """Depthwise convolution as a sum of shifted images: on CPUs far faster than XLA's grouped convolution."""
    side, (height, width) = kernel_C1hw.shape[-1], x_BHWC.shape[1:3]
    ends = [-(-length // stride) for length in (height, width)]
    padding = [max(0, (end - 1) * stride + side - length) for end, length in zip(ends, (height, width), strict=True)]
    x = jnp.pad(x_BHWC, [(0, 0), *((total // 2, total - total // 2) for total in padding), (0, 0)])
    rows, columns = ([slice(i, i + (end - 1) * stride + 1, stride) for i in range(side)] for end in ends)
    places = itertools.product(range(side), repeat=2)
    return cast(Array, sum(x[:, rows[i], columns[j]] * kernel_C1hw[:, 0, i, j] for i, j in places))
