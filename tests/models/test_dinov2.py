"""Parity of DINOv2 with transformers on random weights, by way of a folder that it saves."""

import jax
import numpy as np
import pytest
import torch
from transformers import Dinov2Config as PublishedConfig
from transformers import Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from qi2_jax.interop import frozen
from qi2_jax.models import dinov2
from qi2_jax.models.dinov2 import MEAN, STD, Dinov2Config, bicubic_weights, normalize

PLAIN, REGISTERS = (Dinov2Model, PublishedConfig), (Dinov2WithRegistersModel, Dinov2WithRegistersConfig)
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
CASES = {
    "mlp": (PLAIN, {}),
    "swiglu": (PLAIN, {"use_swiglu_ffn": True, "hidden_size": 20, "num_attention_heads": 5, "mlp_ratio": 3}),
    "odd": (PLAIN, {"patch_size": 7, "image_size": 45, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
    "no_mask_token": (PLAIN, {"use_mask_token": False, "layer_norm_eps": 1e-3, "image_size": [28, 28]}),
    "registers": (REGISTERS, {"num_register_tokens": 3}),
    "registers_swiglu": (REGISTERS, {"use_swiglu_ffn": True, "patch_size": 5, "image_size": 35}),
}
SIZES = [(56, 56), (33, 47), (112, 30)]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model, and ours from the folder that it saved."""
    (model_class, config_class), changes = CASES[request.param]
    torch.manual_seed(0)
    theirs = model_class(config_class(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("dinov2")
    theirs.save_pretrained(folder)
    return theirs, frozen.read_dinov2(folder)


@pytest.mark.parametrize("size", SIZES)
def test_hidden_states_equal_transformers(pair, size):
    theirs, ours = pair
    pixels = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    layers = (0, 2, 3, None)
    found = jax.jit(lambda m, x: [m.hidden_state(x, layer) for layer in layers])(ours, pixels)
    for layer, state in zip(layers, found, strict=True):
        reference = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
        np.testing.assert_allclose(state, reference.numpy(), atol=1e-5, rtol=0)


def test_a_feature_map_has_the_patches_in_their_places(pair):
    _, ours = pair
    side, leading = ours.config.patch, 1 + ours.config.registers
    pixels = np.random.default_rng(2).normal(size=(1, 3 * side, 4 * side + 2, 3)).astype(np.float32)
    found = ours.feature_map(pixels, 2)
    assert found.shape == (1, 3, 4, ours.config.width)
    np.testing.assert_array_equal(found[0, 1, 2], ours.hidden_state(pixels, 2)[0, leading + 4 + 2])


def test_attention_over_many_tokens_gives_the_same(pair, monkeypatch):
    _, ours = pair
    pixels = np.random.default_rng(3).normal(size=(2, *SIZES[0], 3)).astype(np.float32)
    whole = ours.hidden_state(pixels, 2)
    monkeypatch.setattr(dinov2, "WHOLE_SCORES", 1)
    np.testing.assert_allclose(ours.hidden_state(pixels, 2), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("source", "target"), [(37, 37), (37, 16), (16, 37), (4, 1), (1, 5), (5, 4)])
def test_positions_are_resized_as_by_torch(source, target, antialias):
    grid = np.random.default_rng(0).normal(size=(source, source, 2)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid.transpose(2, 0, 1).copy())[None],
        size=(target, target + 1),
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )[0].numpy()
    rows, columns = (bicubic_weights(source, count, antialias=antialias) for count in (target, target + 1))
    ours = np.einsum("yi,xj,ijd->dyx", rows, columns, grid)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_normalisation_of_images():
    image = np.random.default_rng(0).uniform(size=(1, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(normalize(2 * image - 1), (image - MEAN) / STD, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "dinov3"}, "model_type 'dinov3' is not supported"),
        ({"num_channels": 4}, "num_channels is 4; only DINOv2 for RGB"),
        ({"patch_size": [14, 16]}, r"\[14, 16\] is not the side of a square"),
        ({"patch_size": 0}, "do not fit: .* zero"),
        ({"hidden_size": 10**9}, "sizes .*1000000000.* must be integers"),
        ({"hidden_size": 10**400, "mlp_ratio": 1.5}, "do not fit"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'; it must be a number"),
        ({"num_hidden_layers": -1}, "'layers': -1"),
        ({"num_attention_heads": 7}, "multiple of its 7 heads"),
        ({"hidden_act": "swish"}, "activation 'swish' is unknown"),
        ({"hidden_act": ["gelu"]}, "do not fit"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"image_size": 7}, "'grid': 0"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": -1}, "-1 registers"),
    ],
)
def test_configurations_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Dinov2Config.from_dict({"model_type": "dinov2"} | values)


def test_layers_and_sizes_that_are_refused(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="layer is 4; this DINOv2 has the layers 0 to 3"):
        ours.hidden_state(np.zeros((1, 28, 28, 3), np.float32), 4)
    with pytest.raises(ValueError, match="DINOv2 needs at least"):
        ours.hidden_state(np.zeros((1, 4, 28, 3), np.float32))
