"""The alignment of latents with frozen features: terms, schedule, gradient ratio, and the networks themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Dinov2Config as PublishedConfig
from transformers import Dinov2Model

from qi2_jax.interop import frozen
from qi2_jax.models import tree
from qi2_jax.models.dinov2 import Dinov2, Dinov2Config, normalize
from qi2_jax.models.lpips import LPIPS, LPIPSConfig
from qi2_jax.models.vae import VAE, VAEConfig
from qi2_jax.tasks.autoencoder import alignment, balance
from qi2_jax.tasks.autoencoder.config import AlignmentConfig, ExecutionConfig, PerceptualConfig
from qi2_jax.tasks.autoencoder.networks import Networks
from qi2_jax.tasks.autoencoder.objective import Crop, Objective
from qi2_jax.tasks.autoencoder.trained_vae import TrainedVAE

SHAPE = VAEConfig(4, 4, 8, (1, 1), 1, (True,), in_channels=3, out_channels=3)
ALIGNMENT = AlignmentConfig(0.5, "weights", "vgg16", 4)


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(LPIPSConfig((2, 3, 4, 5, 6)), key=jax.random.key(1))


@pytest.fixture(scope="module")
def vae():
    return TrainedVAE(SHAPE, features=5, key=jax.random.key(0))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (2, 16, 18, 3)).astype(np.float32)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.5, 0.25)])
def test_terms_equal_the_published_formula_in_torch(margins):
    rng = np.random.default_rng(0)
    z, f = (rng.normal(size=(2, 4, 3, 6)).astype(np.float32) for _ in range(2))
    f = (f + z).astype(np.float32)  # related, as they are in training
    tz, tf = (torch.from_numpy(x).permute(0, 3, 1, 2).flatten(2).double() for x in (z, f))
    tz.requires_grad_()
    cosine = torch.relu(1 - margins[0] - torch.cosine_similarity(tz, tf, dim=1)).mean()
    within_z, within_f = (torch.cosine_similarity(x[:, :, :, None], x[:, :, None, :], dim=1) for x in (tz, tf))
    distance = torch.relu((within_z - within_f).abs() - margins[1]).mean()
    (cosine + distance).backward()

    def value(z):
        return alignment.terms(z, f, np.tile(np.float32(margins), (2, 1)))

    (found, metrics), gradient = jax.value_and_grad(value, has_aux=True)(z)
    assert float(metrics["alignment/cosine"]) == pytest.approx(float(cosine.detach()), rel=1e-5)
    assert float(metrics["alignment/distance"]) == pytest.approx(float(distance.detach()), rel=1e-5)
    assert float(found) == pytest.approx(float(cosine + distance), rel=1e-5)
    assert float(cosine) > 0 and float(distance) > 0
    np.testing.assert_allclose(gradient, tz.grad.reshape(2, 6, 4, 3).permute(0, 2, 3, 1), atol=1e-6)


def test_the_distance_term_of_large_images_compares_a_coarser_grid(monkeypatch):
    z, f = (np.random.default_rng(seed).normal(size=(1, 6, 4, 3)).astype(np.float32) for seed in range(2))
    monkeypatch.setattr(alignment, "MAX_POSITIONS", 23)
    _, metrics = alignment.terms(z, f, np.zeros((1, 2), np.float32))
    monkeypatch.setattr(alignment, "MAX_POSITIONS", 24)
    _, whole = alignment.terms(z, f, np.zeros((1, 2), np.float32))
    _, coarse = alignment.terms(z[:, ::2, ::2], f[:, ::2, ::2], np.zeros((1, 2), np.float32))
    assert float(metrics["alignment/distance"]) == pytest.approx(float(coarse["alignment/distance"]), rel=1e-6)
    assert float(metrics["alignment/cosine"]) == pytest.approx(float(whole["alignment/cosine"]), rel=1e-6)
    assert float(whole["alignment/distance"]) != pytest.approx(float(coarse["alignment/distance"]), rel=1e-3)


def test_zero_vectors_have_finite_gradients():
    gradient = jax.grad(lambda z: alignment.terms(z, jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2)))[0])
    assert np.isfinite(gradient(jnp.zeros((1, 2, 2, 3)))).all()


def test_margins_are_strict_then_rise_then_stay():
    config = AlignmentConfig(cosine_margin=0.5, distance_margin=0.25, strict_steps=3, relaxing_steps=4)
    found = [alignment.schedule(config, step)[:2] for step in (0, 3, 5, 7, 100)]
    assert found == [(0, 0), (0, 0), (0.25, 0.125), (0.5, 0.25), (0.5, 0.25)]
    at_once = AlignmentConfig(strict_steps=3)
    assert [alignment.schedule(at_once, step)[:2] for step in (2, 3)] == [(0, 0), (0.5, 0.25)]
    assert alignment.schedule(AlignmentConfig(), 0)[:2] == (0.5, 0.25)


def test_the_weight_moves_with_the_margins_and_stays_without_a_relaxed_one():
    config = AlignmentConfig(0.5, "weights", strict_steps=3, relaxing_steps=4, relaxed_weight=0.1)
    found = [alignment.schedule(config, step).weight for step in (0, 3, 5, 7, 100)]
    assert found == [0.5, 0.5, pytest.approx(0.3), 0.1, 0.1]
    at_once = AlignmentConfig(0.5, "weights", strict_steps=3, relaxed_weight=0.1)
    assert [alignment.schedule(at_once, step).weight for step in (2, 3)] == [0.5, 0.1]
    constant = AlignmentConfig(0.5, "weights", strict_steps=3, relaxing_steps=4)
    assert {alignment.schedule(constant, step).weight for step in (0, 3, 7, 100)} == {0.5}


def gradients(objective, networks, vae, pixels, schedule=(0.0, 0.0, ALIGNMENT.weight)):
    batch = Crop(pixels, np.tile(np.float32(schedule), (len(pixels), 1)))
    keys = jax.random.split(jax.random.key(0), len(pixels))
    loss = jax.jit(lambda vae: objective.loss(vae, networks, None, batch, keys))
    (value, metrics), found = jax.value_and_grad(loss, has_aux=True)(vae)
    return float(value), jax.device_get(metrics), jax.device_get(tree.to_dict(found))


def test_the_gradient_at_the_encoders_last_layer_has_the_ratio_of_the_config(lpips, vae, pixels):
    """And everywhere it is that of the reconstruction plus a constant times that of the alignment."""
    networks, perceptual = Networks(lpips, lpips), PerceptualConfig(0.1, "weights")
    value, metrics, whole = gradients(Objective("absolute", perceptual, ALIGNMENT), networks, vae, pixels)
    plain, _, reconstruction = gradients(Objective("absolute", perceptual), networks, vae, pixels)

    def align(vae):
        features = alignment.feature_map(lpips, 4, pixels, (8, 9))
        return alignment.terms(vae.projection(vae.encode(pixels).mean), features, jnp.zeros((2, 2)))[0]

    aligned, towards = jax.value_and_grad(align)(vae)
    towards = tree.to_dict(towards)
    last = "encoder.conv_out.weight"
    length = np.linalg.norm(towards[last])
    ratio = np.linalg.norm(whole[last] - reconstruction[last]) / np.linalg.norm(reconstruction[last])
    assert ratio == pytest.approx(0.5 * length / (length + balance.RATIO_EPSILON), rel=1e-3)
    factor = metrics["alignment/weight"]
    for name, gradient in whole.items():
        expected = reconstruction[name] + factor * np.asarray(towards[name])
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * max(1, np.abs(expected).max()), err_msg=name)
    assert np.abs(whole["projection.weight"]).max() > 0
    assert value == pytest.approx(plain + factor * float(aligned), rel=1e-5)
    assert metrics["reconstruction"] == pytest.approx(plain, rel=1e-5)


def test_the_factor_follows_the_weight_of_the_update(lpips, vae, pixels):
    networks, objective = Networks(None, lpips), Objective("absolute", alignment=ALIGNMENT)
    found = [gradients(objective, networks, vae, pixels, (0.0, 0.0, weight))[1] for weight in (0.5, 0.1)]
    assert found[1]["alignment/weight"] == pytest.approx(found[0]["alignment/weight"] / 5, rel=1e-5)
    assert found[1]["alignment/cosine"] == pytest.approx(found[0]["alignment/cosine"], rel=1e-6)


def test_frozen_networks_are_inputs_of_the_program_and_not_constants_in_it(lpips, vae, pixels):
    objective = Objective("absolute", PerceptualConfig(0.1, "weights"), ALIGNMENT)

    def gradient(vae, networks, batch, keys):
        return jax.grad(lambda vae: objective.loss(vae, networks, None, batch, keys)[0])(vae)

    batch, keys = Crop(pixels, np.zeros((2, 3), np.float32)), jax.random.split(jax.random.key(0), 2)
    constants = jax.make_jaxpr(gradient)(vae, Networks(lpips, lpips), batch, keys).consts
    assert all(np.size(constant) <= 3 for constant in constants)


@pytest.mark.parametrize("levels", [1, 2])
def test_recomputed_levels_leave_loss_and_gradients_as_they_are(lpips, vae, pixels, levels):
    """Of the whole loss, where the encoder is differentiated by parts."""
    networks, perceptual = Networks(lpips, lpips), PerceptualConfig(0.1, "weights")
    found = [
        gradients(Objective("absolute", perceptual, ALIGNMENT, 1e-3, execution), networks, vae, pixels)
        for execution in (ExecutionConfig(), ExecutionConfig(remat_levels=levels))
    ]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, gradient in found[0][2].items():
        np.testing.assert_allclose(
            found[1][2][name], gradient, atol=1e-6 * max(1, np.abs(gradient).max()), err_msg=name
        )


def test_in_bf16_the_loss_and_the_gradients_are_fp32_and_close(lpips, vae, pixels):
    networks, perceptual = Networks(lpips, lpips), PerceptualConfig(0.1, "weights")
    found = [
        gradients(Objective("absolute", perceptual, ALIGNMENT, 1e-3, execution), networks, vae, pixels)
        for execution in (ExecutionConfig(), ExecutionConfig(jnp.dtype(jnp.bfloat16), remat_levels=1))
    ]
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02) and found[1][0] != found[0][0]
    for name, gradient in found[0][2].items():
        assert found[1][2][name].dtype == np.float32
        assert np.linalg.norm(found[1][2][name] - gradient) < 0.25 * np.linalg.norm(gradient) + 1e-3, name


def test_alignment_within_its_margins_leaves_the_gradient_of_the_reconstruction(lpips, vae, pixels):
    networks = Networks(None, lpips)
    _, metrics, whole = gradients(Objective("absolute", alignment=ALIGNMENT), networks, vae, pixels, (2.0, 2.0, 0.5))
    _, _, reconstruction = gradients(Objective("absolute"), networks, vae, pixels)
    assert metrics["alignment/cosine"] == metrics["alignment/distance"] == 0
    for name, gradient in whole.items():
        np.testing.assert_allclose(gradient, reconstruction[name], atol=1e-7, err_msg=name)


def test_the_kl_term_can_be_added_to_it(lpips, vae, pixels):
    networks = Networks(None, lpips)
    without = gradients(Objective("absolute", alignment=ALIGNMENT, kl=1e-12), networks, vae, pixels)
    with_kl = gradients(Objective("absolute", alignment=ALIGNMENT, kl=1.0), networks, vae, pixels)
    assert with_kl[0] == pytest.approx(without[0] + with_kl[1]["kl"], rel=1e-4)
    assert np.abs(with_kl[2]["quant_conv.bias"] - without[2]["quant_conv.bias"]).max() > 1e-4


def test_the_projection_changes_no_other_parameter(vae):
    plain, aligned = (tree.to_dict(model) for model in (VAE(SHAPE, key=jax.random.key(0)), vae))
    assert aligned.keys() - plain.keys() == {"projection.weight"} and not plain.keys() - aligned.keys()
    for name, leaf in plain.items():
        np.testing.assert_array_equal(aligned[name], leaf)


def test_features_have_the_grid_of_the_latents(lpips, pixels):
    features = lpips.features(pixels)
    np.testing.assert_array_equal(alignment.feature_map(lpips, 2, pixels, (8, 9)), features[1])
    pooled = np.asarray(features[0]).reshape(2, 8, 2, 9, 2, 2)
    smaller = np.asarray(alignment.feature_map(lpips, 1, pixels, (8, 9)))
    assert smaller.shape == (2, 8, 9, 2)
    assert np.corrcoef(smaller.ravel(), pooled.mean((2, 4)).ravel())[0, 1] > 0.9
    dinov2 = Dinov2(Dinov2Config(8, 2, 2, 16, "gelu", False, True, 1e-6, 4, 7, 0), key=jax.random.key(0))
    found = alignment.feature_map(dinov2, 1, pixels, (2, 3))
    resized = jax.image.resize(pixels, (2, 14, 21, 3), "linear")
    np.testing.assert_allclose(found, dinov2.feature_map(normalize(resized), 1), atol=1e-6)


def test_layer_0_is_the_normalised_output_of_dinov2_in_transformers(tmp_path):
    """Without the class token, as VA-VAE reads it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7)
    theirs = Dinov2Model(PublishedConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 21, 35, 3)).astype(np.float32)  # as large as the patches need
    inputs = torch.from_numpy(np.array(normalize(images)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        published = theirs(inputs, output_hidden_states=True)
    ours = frozen.read_dinov2(tmp_path)
    for layer, expected in ((0, published.last_hidden_state), (3, published.hidden_states[3])):
        found = alignment.feature_map(ours, layer, images, (3, 5))
        np.testing.assert_allclose(found, expected[:, 1:].numpy().reshape(2, 3, 5, 24), atol=1e-5, rtol=0)
        assert alignment.feature_channels(ours, layer) == 24
    assert not np.allclose(published.last_hidden_state, published.hidden_states[3], atol=1e-2)
    with pytest.raises(ValueError, match=r"layer is 4; this network has the layers 1 to 3, and 0 for the last one aft"):
        alignment.feature_channels(ours, 4)


@pytest.mark.parametrize("layer", [0, 6])
def test_a_layer_that_the_network_does_not_have_is_refused(lpips, layer):
    with pytest.raises(ValueError, match=f"alignment.layer is {layer}; this network has the layers 1 to 5"):
        alignment.feature_channels(lpips, layer)
