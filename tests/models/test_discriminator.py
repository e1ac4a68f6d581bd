"""The discriminator of patches beside the same layers in PyTorch."""

import jax
import numpy as np
import pytest
import torch

from qi2_jax.models import tree
from qi2_jax.models.discriminator import MIN_SIDE, PatchDiscriminator


@pytest.fixture(scope="module")
def discriminator():
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: PatchDiscriminator(6, key=jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 8, shapes)


def in_torch(weights, width=6, groups=2):
    dims = [3, width, 2 * width, 4 * width, 8 * width]
    layers = []
    for number in range(4):
        conv = torch.nn.Conv2d(dims[number], dims[number + 1], 4, 2 if number < 3 else 1, padding=1)
        parts = [(conv, f"convs.{number}")]
        if number:
            parts.append((torch.nn.GroupNorm(groups, dims[number + 1]), f"norms.{number - 1}"))
        layers += [*parts, (torch.nn.LeakyReLU(0.2), None)]
    layers.append((torch.nn.Conv2d(dims[-1], 1, 4, 1, padding=1), "conv_out"))
    for layer, name in layers:
        if name:
            layer.load_state_dict(
                {part: torch.from_numpy(np.array(weights[f"{name}.{part}"])) for part in ("weight", "bias")}
            )
    return torch.nn.Sequential(*(layer for layer, _ in layers))


def test_logits_equal_those_in_torch_also_for_sides_that_are_odd_on_the_way(discriminator):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 44, 30, 3)).astype(np.float32)
    with torch.no_grad():
        expected = in_torch(tree.to_dict(discriminator))(torch.from_numpy(images).permute(0, 3, 1, 2))[:, 0]
    found = jax.jit(lambda model, images: model(images))(discriminator, images)
    assert found.shape == expected.shape == (2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(found) > 1e-3


def test_the_published_width_has_the_published_shapes_and_the_smallest_side_gives_one_patch():
    def logits(side):
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        return jax.eval_shape(lambda images: PatchDiscriminator(64, key=jax.random.key(0))(images), images).shape

    assert [logits(side) for side in (256, MIN_SIDE, MIN_SIDE - 1)] == [(1, 30, 30), (1, 1, 1), (1, 0, 0)]
    model = jax.eval_shape(lambda: PatchDiscriminator(64, key=jax.random.key(0)))
    convolutions = sum(16 * a * b + b for a, b in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == convolutions + 2 * (128 + 256 + 512)
