"""VGG16's convolutions with the layout of torchvision, which is not installed beside the CPU build of PyTorch."""

import sys
import types
from collections.abc import Sequence

import pytest
import torch

from qi2_jax.models.vgg16 import DEPTHS, WIDTHS


def features(widths: Sequence[int] = WIDTHS, seed: int = 0) -> torch.nn.Sequential:
    """torchvision's `vgg16().features` with random weights whose activations stay in range."""
    generator, layers, dim = torch.Generator().manual_seed(seed), [], 3
    for width, depth in zip(widths, DEPTHS, strict=True):
        for _ in range(depth):
            conv = torch.nn.Conv2d(dim, width, 3, padding=1)
            with torch.no_grad():
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / (9 * dim)) ** 0.5)
                conv.bias.copy_(torch.randn(conv.bias.shape, generator=generator) * 0.1)
            layers += [conv, torch.nn.ReLU()]
            dim = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    return torch.nn.Sequential(*layers)


def package() -> types.ModuleType:
    """The authors' package `lpips`, which takes VGG16 from a stand-in for torchvision; skips where it is missing."""
    models = types.ModuleType("torchvision.models")
    models.vgg16 = lambda pretrained: types.SimpleNamespace(features=features())
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", torchvision)
        patch.setitem(sys.modules, "torchvision.models", models)
        return pytest.importorskip(
            "lpips", reason="pip install --no-deps lpips==0.1.4 (its dependencies replace torch)"
        )
