"""LPIPS of 8-bit images equals the package's, and the Fréchet distance its formula."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qi2_jax.evaluation.perceptual import Perceptual, frechet_distance
from qi2_jax.interop import frozen, lpips
from tests.evaluation.test_pixel_metrics import pair
from tests.models import torch_vgg16


def test_lpips_equals_the_package(tmp_path):
    theirs = torch_vgg16.package().LPIPS(net="vgg", verbose=False).eval()
    tensors = {f"features.{name}": tensor for name, tensor in torch_vgg16.features().state_dict().items()}
    tensors |= {f"lin{block}.model.1.weight": head.model[-1].weight.detach() for block, head in enumerate(theirs.lins)}
    save_file(tensors, tmp_path / "torch.safetensors")
    lpips.convert(tmp_path / "torch.safetensors", tmp_path / "lpips")
    ours = Perceptual(tmp_path / "lpips")
    a, b = (np.stack(side) for side in zip(*(pair(seed, 32, 48) for seed in range(2)), strict=True))
    scaled = [torch.from_numpy(side).permute(0, 3, 1, 2).float() / 127.5 - 1 for side in (a, b)]
    with torch.no_grad():
        expected = theirs(*scaled).reshape(-1).numpy()
    distances, features, others = ours(a, b)
    assert expected.min() > 0.01
    np.testing.assert_allclose(distances, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours(a, a)[0], 0)
    np.testing.assert_allclose(ours(b, a)[0], distances, atol=1e-6)
    assert features.shape == others.shape == (2, 512) and np.abs(features - others).max() > 0
    assert ours.digest == frozen.digest(tmp_path / "lpips")


@pytest.mark.parametrize("count", [5, 40])
def test_frechet_distance_equals_the_formula(count):
    """With fewer and with more images than features."""
    rng = np.random.default_rng(count)
    a, b = rng.normal(size=(count, 8)), rng.normal(0.3, 2, size=(count, 8))
    cov_a, cov_b = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b)) if count > 8 else None
    values = np.sqrt(np.maximum(np.real(scipy.linalg.eigvals(cov_a @ cov_b)), 0))
    shared = np.trace(root) if root is not None else values.sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 6))
def test_frechet_distance_is_symmetric_and_zero_for_equal_sets(seed, count, width):
    a, b = np.random.default_rng(seed).normal(size=(2, count, width))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, b) >= 0
