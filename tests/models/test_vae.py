"""The autoencoder against diffusers, its import and export, and properties that training needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage21

from qi2_jax.interop import tensor_names
from qi2_jax.interop import vae as interop
from qi2_jax.models import tree, vae_blocks
from qi2_jax.models.vae import VAE, Encoder, VAEConfig
from qi2_jax.models.vae_blocks import ChannelNorm

# Different widths, numbers of levels, flags, residual blocks and channels, each with an image size in latents.
CASES = {
    "published_levels": (VAEConfig(4, 8, 64, (1, 2, 4, 8, 8), 2), (2, 3)),
    "four_levels": (VAEConfig(6, 10, 16, (1, 2, 4, 4), 1, (True, False, True), in_channels=3, out_channels=3), (5, 3)),
    "three_levels": (VAEConfig(12, 4, 8, (1, 2, 2), 3, (False, True), out_channels=3), (4, 7)),
    # Shortcuts that move single pixels into channels and back (1 -> 4), and that average channels (4 -> 2).
    "odd_multipliers": (VAEConfig(5, 3, 12, (1, 1, 4, 2), 1, (True, True, False), in_channels=3), (2, 4)),
    "patches": (VAEConfig(12, 8, 8, (1, 2, 2), 1, (False, True), in_channels=3, out_channels=3, patch_size=2), (3, 2)),
    "one_level": (VAEConfig(20, 18, 6, (1,), 1, (), patch_size=4), (2, 5)),
}
TINY = VAEConfig(4, 4, 8, (1, 1), 1, (True,), in_channels=3, out_channels=3)

# Here compiling takes far longer than running.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def abstract(config):
    return jax.eval_shape(lambda: VAE(config, key=jax.random.key(0)))


def random_torch(config, seed=0):
    """The published implementation with random weights, gains and biases as large as trained ones."""
    torch.manual_seed(seed)
    model = AutoencoderKLQwenImage21.from_config(interop.to_diffusers(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model


def published_arrays(model, of=lambda parameter: parameter):
    """{published name: `of(parameter)` as an array} of the parameters that affect the computation."""
    passthrough = interop.name_map(VAEConfig()).is_passthrough
    return {name: of(p).detach().numpy() for name, p in model.named_parameters() if not passthrough(name)}


def to_ours(config, arrays):
    like = abstract(config)
    return tree.from_dict(like, tensor_names.stack(arrays, tree.to_dict(like), interop.name_map(config)))


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))[:, :, None]  # with one frame


def nhwc(x):
    return np.moveaxis(x.detach().numpy()[:, :, 0], 1, -1)


def relative_error(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def images_and_models(case):
    config, (h, w) = CASES[case]
    size = (2, h * config.factor, w * config.factor, config.in_channels)
    images = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    theirs = random_torch(config)
    return images, to_ours(config, published_arrays(theirs)), theirs


@pytest.mark.parametrize("case", CASES)
def test_parity_of_latents_and_images(case):
    x, ours, theirs = images_and_models(case)
    with torch.no_grad():
        posterior = theirs.encode(nchw(x)).latent_dist
        images = nhwc(theirs.decode(posterior.mean).sample)
    mean, logvar = compiled(lambda model, x: model.encode(x))(ours, x)
    assert mean.shape == (2, *CASES[case][1], CASES[case][0].latent_channels)
    assert relative_error(mean, nhwc(posterior.mean)) < 1e-5
    assert relative_error(logvar, nhwc(posterior.logvar)) < 1e-5
    decode = compiled(lambda model, z: (model.decode(z), model.decode(z, clamp=False)))
    clamped, free = decode(ours, nhwc(posterior.mean))
    assert relative_error(clamped, images) < 1e-5
    np.testing.assert_array_equal(np.clip(free, -1, 1), clamped)
    assert np.max(np.abs(free)) > 1.0


def test_parity_of_gradients():
    x, ours, theirs = images_and_models("four_levels")
    posterior = theirs.encode(nchw(x)).latent_dist
    images = theirs.decode(posterior.mean).sample
    rng = np.random.default_rng(1)
    weights_logvar = rng.normal(size=nhwc(posterior.logvar).shape).astype(np.float32)
    weights_images = rng.normal(size=x.shape).astype(np.float32)
    weights_images *= np.abs(nhwc(images)) < 0.999  # at the clamp's limits, a pixel's gradient depends on rounding

    def loss(model, x):
        posterior = model.encode(x)
        return jnp.sum(model.decode(posterior.mean) * weights_images) + jnp.sum(posterior.logvar * weights_logvar)

    gradients = tree.to_dict(compiled(jax.grad(loss))(ours, x))
    ((images * nchw(weights_images)).sum() + (posterior.logvar * nchw(weights_logvar)).sum()).backward()
    expected = tree.to_dict(to_ours(CASES["four_levels"][0], published_arrays(theirs, lambda p: p.grad)))
    errors = {name: relative_error(gradient, expected[name]) for name, gradient in gradients.items()}
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


def test_published_sizes_names_and_shapes():
    with torch.device("meta"):
        theirs = AutoencoderKLQwenImage21()
    config = interop.from_diffusers(theirs.config)
    assert dataclasses.replace(config, latents_mean=None, latents_std=None) == VAEConfig()
    entries = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    assert interop.to_diffusers(config) == {"_class_name": "AutoencoderKLQwenImage21", **entries}
    published = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    ours = {name: leaf.shape for name, leaf in tree.to_dict(abstract(config)).items()}
    passthrough = interop.passthrough_shapes(config)
    tensor_names.check(published, ours, interop.name_map(config), "vae")
    assert passthrough == {name: s for name, s in published.items() if interop.name_map(config).is_passthrough(name)}

    def total(prefix):
        return sum(int(np.prod(s)) for name, s in [*ours.items(), *passthrough.items()] if name.startswith(prefix))

    for part, parameters in (("encoder.", 78_675_680), ("decoder.", 259_044_052)):
        assert total(part) == parameters
        assert total(part) == sum(p.numel() for name, p in theirs.named_parameters() if name.startswith(part))


def test_wrong_tensors_are_listed_by_name():
    like = tree.to_dict(abstract(TINY))
    name_map = interop.name_map(TINY)
    arrays = {
        name_map.to_published(name, leaf.shape)[0]: np.zeros(leaf.shape, np.float32) for name, leaf in like.items()
    }
    arrays["encoder.down_blocks.0.downsampler.time_conv.weight"] = np.zeros((4, 4, 1, 1), np.float32)
    tensor_names.stack(arrays, like, name_map)  # complete
    del arrays["encoder.down_blocks.0.downsampler.resample.1.weight"]
    arrays["decoder.mid_block.resnets.2.conv1.weight"] = np.zeros((4, 4, 3, 3), np.float32)
    arrays["encoder.norm_out.gamma"] = np.zeros((4,), np.float32)
    with pytest.raises(ValueError) as error:
        tensor_names.stack(arrays, like, name_map)
    lines = str(error.value).splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        ["missing:", "encoder.down_blocks.0.downsampler.resample.1.weight"],
        ["unexpected:", "decoder.mid_block.resnets.2.conv1.weight"],
        ["misshapen:", "encoder.norm_out.gamma"],
    ]


@pytest.mark.parametrize("case", CASES)
def test_configuration_round_trip(case):
    config = CASES[case][0]
    read = interop.from_diffusers(interop.to_diffusers(config))
    assert dataclasses.replace(read, latents_mean=None, latents_std=None) == config
    assert set(read.latents_mean) == {0.0} and set(read.latents_std) == {1.0}


def test_absent_sizes_are_the_published_ones_and_statistics_are_not_guessed():
    statistics = {"latents_mean": [0.5] * 64, "latents_std": [2.0] * 64}
    expected = VAEConfig(latents_mean=(0.5,) * 64, latents_std=(2.0,) * 64)
    assert interop.from_diffusers(statistics) == expected
    narrow = interop.from_diffusers({**statistics, "base_dim": 32, "decoder_base_dim": None})
    assert narrow == dataclasses.replace(expected, encoder_width=32, decoder_width=32)
    with pytest.raises(ValueError, match="latents_std"):
        interop.from_diffusers({"latents_mean": [0.0] * 64})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_residual", False),
        ("attn_scales", [0.5]),
        ("patch_size", 3),
        ("dropout", 0.1),
        ("scale_factor_spatial", 8),
        ("_class_name", "AutoencoderKLWan"),
        ("time_scale", 3),
        ("in_channels", 5),
        ("z_dim", 0),
        ("latents_std", [1.0] * 63),
        ("temperal_downsample", [True]),
        ("dim_mult", [1, 2, 4, 8, 5]),
    ],
)
def test_unsupported_configuration_is_refused(key, value):
    ours = {"z_dim": "latent_channels", "temperal_downsample": "halves_time", "dim_mult": "multipliers"}
    with pytest.raises(ValueError, match=ours.get(key, key.replace("_class_name", "class"))):
        interop.from_diffusers({**interop.to_diffusers(VAEConfig()), key: value})


def test_sizes_of_arrays_are_checked():
    model = abstract(TINY)
    with pytest.raises(ValueError, match="5 x 4 pixels"):
        model.encode(jnp.zeros((1, 5, 4, 3)))
    with pytest.raises(ValueError, match="4 channels; this encoder takes 3"):
        model.encode(jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(ValueError, match="7 channels; this decoder takes 8"):
        model.decode(jnp.zeros((1, 2, 2, 7)))


def test_normalisation_uses_the_statistics_of_each_channel():
    mean, std = np.linspace(-3, 4, 8), np.linspace(2, 5, 8)
    model = abstract(dataclasses.replace(TINY, latents_mean=tuple(mean), latents_std=tuple(std)))
    latents = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    np.testing.assert_allclose(model.normalize(latents), (latents - mean) / std, atol=1e-6)
    np.testing.assert_allclose(model.denormalize(model.normalize(latents)), latents, atol=1e-6)
    assert model.normalize(jnp.asarray(latents, jnp.bfloat16)).dtype == jnp.bfloat16


def test_computes_in_the_dtype_of_the_input_with_norms_in_fp32():
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.bfloat16)
    posterior = jax.eval_shape(lambda model, x: model.encode(x), abstract(TINY), x)
    images = jax.eval_shape(lambda model, z: model.decode(z), abstract(TINY), posterior.mean)
    assert posterior.mean.dtype == posterior.logvar.dtype == images.dtype == jnp.bfloat16
    norm = ChannelNorm(512)
    x = jax.random.normal(jax.random.key(2), (1, 2, 2, 512), jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_gradients_of_an_image_of_zeros_are_small():
    """The norms divide by a pixel's norm, so a fresh encoder must not map a zero pixel to nearly zero."""
    encoder = compiled(lambda: Encoder(TINY, key=jax.random.key(0)))()
    gradients = compiled(jax.grad(lambda m, x: jnp.mean(m(x, remat_levels=0))))(encoder, jnp.zeros((1, 4, 8, 3)))
    largest = {name: float(jnp.abs(gradient).max()) for name, gradient in tree.to_dict(gradients).items()}
    assert 0.0 < max(largest.values()) < 10.0, largest


def test_attention_over_many_positions_gives_the_same(monkeypatch):
    model = VAE(TINY, key=jax.random.key(0))
    proj = model.encoder.mid_block.attentions[0].proj.weight
    proj.set_value(jax.random.normal(jax.random.key(1), proj.get_value().shape))  # it starts at zero
    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    whole = model.encode(x).mean
    monkeypatch.setattr(vae_blocks, "WHOLE_SCORES", 119)  # of 120 positions
    np.testing.assert_allclose(model.encode(x).mean, whole, rtol=1e-5, atol=1e-5)


def test_remat_keeps_less_for_the_backward_pass():
    def kept(levels):
        def run(model, x):
            return model.decode(model.encode(x, remat_levels=levels).mean, remat_levels=levels)

        x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        backward = jax.eval_shape(lambda model, x: jax.vjp(run, model, x)[1], abstract(TINY), x)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    none, first, every = kept(0), kept(1), kept(len(TINY.multipliers))
    assert every < 0.3 * none
    assert every < first < none
