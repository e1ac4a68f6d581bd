"""Parity of LPIPS with the authors' package, and of its gradient."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qi2_jax.interop import frozen
from qi2_jax.interop import lpips as conversion
from qi2_jax.models.lpips import LPIPS, SCALE, SHIFT, LPIPSConfig
from tests.models import torch_vgg16

TINY = (16, 18, 17, 20, 19)  # fewer channels give vectors of nearly no length, whose direction is rounding
ODD = (33, 47)  # pixels; an odd last row and column is dropped by every pooling


@jax.jit
def distance(model: LPIPS, a: np.ndarray, b: np.ndarray) -> jax.Array:
    return model(a, b)


@jax.jit
def distance_and_gradient(model: LPIPS, a: np.ndarray, b: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Distance of each pair, and the gradient of their mean with respect to `b`."""

    def mean(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = model(a, b)
        return each.mean(), each

    (_, each), gradient = jax.value_and_grad(mean, has_aux=True)(b)
    return each, gradient


def images(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth images in [-1, 1] and noisy versions of them, of which one has a constant area."""
    rng = np.random.default_rng(seed)
    y, x = (places[..., None] for places in np.mgrid[:height, :width])
    phases = rng.uniform(0, 6, (3, 1, 1, 3))
    a = np.sin(y / 5 + phases) * np.cos(x / 7 - phases)
    a[0, : height // 2] = 0.25
    b = np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1)
    return a.astype(np.float32), b.astype(np.float32)


def to_torch(images: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)


def converted(features: torch.nn.Sequential, heads: list[torch.Tensor], folder) -> LPIPS:
    """Our model, by way of a file with torchvision's names and the converter."""
    tensors = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    tensors |= {f"lin{block}.model.1.weight": head.reshape(1, -1, 1, 1) for block, head in enumerate(heads)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "torch.safetensors")
    conversion.convert(folder / "torch.safetensors", folder / "lpips")
    return frozen.read_lpips(folder / "lpips")


@pytest.fixture(scope="module")
def package_pair(tmp_path_factory):
    """The package with its published heads on a random VGG16, and ours with the same weights."""
    theirs = torch_vgg16.package().LPIPS(net="vgg", verbose=False).eval()
    heads = [head.model[-1].weight.detach() for head in theirs.lins]
    return theirs, converted(torch_vgg16.features(), heads, tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small network with random heads: PyTorch's layers and heads, and our model."""
    features = torch_vgg16.features(TINY, seed=1)
    heads = [torch.rand(width, generator=torch.Generator().manual_seed(width)) for width in TINY]
    return features, heads, converted(features, heads, tmp_path_factory.mktemp("tiny"))


def formula(features: torch.nn.Sequential, heads: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation 1 of the paper, written for PyTorch."""
    shift, scale = (torch.from_numpy(values)[:, None, None] for values in (SHIFT, SCALE))
    pair, total, block = [(a - shift) / scale, (b - shift) / scale], 0, 0
    for index, layer in enumerate(features):
        pair = [layer(x) for x in pair]
        if index + 1 < len(features) and isinstance(features[index + 1], torch.nn.MaxPool2d):
            x, y = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in pair)
            total = total + ((x - y) ** 2 * heads[block][:, None, None]).sum(1).mean((1, 2))
            block += 1
    return total


@pytest.mark.parametrize("size", [(64, 64), ODD, (16, 50)])
def test_distance_equals_the_package(package_pair, size):
    theirs, ours = package_pair
    a, b = images(*size)
    with torch.no_grad():
        expected = theirs(to_torch(a), to_torch(b)).reshape(-1).numpy()
    found = distance(ours, a, b)
    assert found.shape == (3,) and expected.min() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_gradient_equals_the_package(package_pair):
    """In float64: in float32, rounding decides which of two nearly equal pixels PyTorch's pooling takes."""
    theirs, ours = copy.deepcopy(package_pair[0]).double(), package_pair[1]
    a, b = images(*ODD)
    x = to_torch(b, torch.float64).requires_grad_()
    theirs(to_torch(a, torch.float64), x).mean().backward()
    expected = x.grad.numpy().transpose(0, 2, 3, 1)
    _, found = distance_and_gradient(ours, a, b)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_distance_and_gradient_equal_the_formula(tiny):
    features, heads, ours = copy.deepcopy(tiny[0]).double(), tiny[1], tiny[2]
    a, b = images(*ODD)
    x = to_torch(b, torch.float64).requires_grad_()
    reference = formula(features, heads, to_torch(a, torch.float64), x)
    reference.mean().backward()
    each, gradient = distance_and_gradient(ours, a, b)
    np.testing.assert_allclose(each, reference.detach().numpy(), atol=1e-5, rtol=0)
    expected = x.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_equal_images_have_no_distance_and_order_does_not_matter(tiny):
    model, (a, b) = tiny[2], images(*ODD)
    np.testing.assert_array_equal(distance(model, a, a), 0)
    np.testing.assert_array_equal(distance(model, a, b), distance(model, b, a))
    assert jnp.all(distance(model, a, b) > 0)


def test_gradient_is_finite_where_all_features_are_zero(tiny):
    """The derivative of a vector's length at zero is infinite, and infinity times zero is NaN."""
    dead = jax.tree.map(lambda leaf: leaf, tiny[2])
    dead.vgg.convs[0].bias[...] = dead.vgg.convs[0].bias[...] - 100.0
    each, gradient = distance_and_gradient(dead, *images(*ODD))
    assert jnp.all(jnp.isfinite(each)) and jnp.all(jnp.isfinite(gradient))


def test_bfloat16_images_are_compared_in_fp32(tiny):
    model, (a, b) = tiny[2], images(*ODD)
    rough = distance(model, *(jnp.asarray(x, jnp.bfloat16) for x in (a, b)))
    taps = jax.eval_shape(lambda m, x: m.features(x), model, jnp.asarray(a, jnp.bfloat16))
    assert rough.dtype == jnp.float32 and {tap.dtype for tap in taps} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(rough, distance(model, a, b), rtol=0.05)


def test_weights_are_an_input_of_the_compiled_program(tiny):
    text = distance.lower(tiny[2], *images(*ODD)).as_text()
    arguments = text[text.index("@main(") : text.index("->")].count("%arg")
    assert arguments == len(jax.tree.leaves(tiny[2])) + 2


def test_sizes_that_are_refused(tiny):
    with pytest.raises(ValueError, match=r"images are \(15, 64\) pixels; VGG16 needs sides of at least 16"):
        tiny[2].features(np.zeros((1, 15, 64, 3), np.float32))
    with pytest.raises(ValueError, match="must be a list of 5 integers"):
        LPIPSConfig((64, 128))
