"""Random weights of LPIPS on a small VGG16, under the names of torchvision and of the package `lpips`."""

import numpy as np

from qi2_jax.models.vgg16 import DEPTHS

WIDTHS = (4, 6, 5, 8, 7)


def published(widths=WIDTHS) -> dict[str, np.ndarray]:
    """{published name: array}; the same on every call."""
    rng, tensors, index, dim = np.random.default_rng(0), {}, 0, 3
    for block, (width, depth) in enumerate(zip(widths, DEPTHS, strict=True)):
        for _ in range(depth):
            tensors[f"features.{index}.weight"] = rng.normal(size=(width, dim, 3, 3))
            tensors[f"features.{index}.bias"] = rng.normal(size=width)
            dim, index = width, index + 2
        tensors[f"lin{block}.model.1.weight"], index = rng.uniform(size=(1, width, 1, 1)), index + 1
    return {name: array.astype(np.float32) for name, array in tensors.items()}
