"""The transformer against diffusers; and padding, the prefix cache and options that diffusers does not have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImage21Transformer2DModel

from qi2_jax.interop import mmdit as interop
from qi2_jax.interop import tensor_names
from qi2_jax.models import tree
from qi2_jax.models.mmdit import Conditioning, MMDiT, MMDiTConfig
from qi2_jax.sequence import Layout, place

CONFIGS = {
    "two_heads": MMDiTConfig(2, 2, 16, 3, 64, 24, (4, 6, 6)),
    "odd_widths": MMDiTConfig(3, 3, 20, 2, 12, 40, (8, 4, 8), eps=1e-5),
    "one_layer": MMDiTConfig(1, 1, 32, 4, 8, 16, (16, 8, 8)),
}
GRIDS = {0: ((4, 6), []), 1: ((6, 2), [(2, 4)]), 2: ((4, 4), [(6, 2), (2, 2)]), 3: ((2, 8), [(4, 2), (2, 2), (2, 6)])}


@dataclasses.dataclass
class Sample:
    """A sample with the inputs of both sides; text segments surround the condition images."""

    texts: list[np.ndarray]
    conditions: list[np.ndarray]
    target: np.ndarray
    condition_grids: list[tuple[int, int]]
    target_grid: tuple[int, int]

    @classmethod
    def random(cls, config, images: int, seed: int, longer: int = 0):
        rng = np.random.default_rng(seed)
        grid, grids = GRIDS[images]
        draw = lambda n, width: rng.normal(size=(n, width)).astype(np.float32)
        texts = [draw(int(rng.integers(2, 6)) + longer, config.text_width) for _ in range(images + 1)]
        conditions = [draw(math.prod(g), config.latent_channels) for g in grids]
        return cls(texts, conditions, draw(math.prod(grid), config.latent_channels), grids, grid)


def random_torch(config, seed=0):
    torch.manual_seed(seed)
    values = {key: value for key, value in interop.to_diffusers(config).items() if key != "_class_name"}
    model = QwenImage21Transformer2DModel(**values).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As large as trained weights: much larger ones amplify fp32 rounding beyond any tolerance.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
            if "norm_q" in name or "norm_k" in name:
                parameter.add_(1.0)
    return model


def ours_from_torch(config, model):
    like = jax.eval_shape(lambda: MMDiT(config, key=jax.random.key(0)))
    published = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return tree.from_dict(like, tensor_names.stack(published, tree.to_dict(like), interop.NAMES))


def torch_forward(model, sample: Sample, t: float, use_cache=False):
    features, slots = [sample.texts[0]], [False] * len(sample.texts[0])
    for grid, text in zip(sample.condition_grids, sample.texts[1:], strict=True):
        count = math.prod(grid) // 4
        features += [np.full((count, text.shape[1]), 7.0, np.float32), text]  # states at image slots are overwritten
        slots += [True] * count + [False] * len(text)
    slots += [True] * (len(sample.target) // 4)
    arguments = dict(
        hidden_states=torch.from_numpy(np.concatenate([*sample.conditions, sample.target]))[None],
        encoder_hidden_states=torch.from_numpy(np.concatenate(features))[None],
        timestep=torch.tensor([t]),
        img_shapes=[[(1, *grid) for grid in [*sample.condition_grids, sample.target_grid]]],
        img_mask=torch.tensor(slots)[None],
        return_dict=False,
    )
    return model(**arguments)[0][0, -len(sample.target) :]


def batch(samples: list[Sample], extra_text=0, extra_image=0, fill=0.0):
    """Pads samples to one layout with the value `fill`."""
    segments, images = len(samples[0].texts), len(samples[0].conditions)
    layout = Layout(
        text=tuple(max(len(s.texts[i]) for s in samples) + extra_text for i in range(segments)),
        target=max(len(s.target) for s in samples) + extra_image,
        conditions=tuple(max(len(s.conditions[i]) for s in samples) + extra_image for i in range(images)),
    )
    pad = lambda x, slots: np.concatenate([x, np.full((slots - len(x), x.shape[1]), fill, np.float32)])
    rows = lambda parts, slots: np.concatenate([pad(x, n) for x, n in zip(parts, slots, strict=True)])
    placed = [place(layout, [len(x) for x in s.texts], s.target_grid, s.condition_grids) for s in samples]
    given = Conditioning(
        text_BTE=jnp.asarray([rows(s.texts, layout.text) for s in samples]),
        positions_BS3=jnp.asarray([positions for positions, _ in placed]),
        valid_BS=jnp.asarray([valid for _, valid in placed]),
        conditions_BMC=jnp.asarray([rows(s.conditions, layout.conditions) for s in samples]) if images else None,
    )
    return layout, jnp.asarray([pad(s.target, layout.target) for s in samples]), given


def relative(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def run(model, layout, target, t, given):
    return jax.jit(type(model).__call__, static_argnums=1)(model, layout, target, t, given)


@pytest.mark.parametrize("images", GRIDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_forward(name, images):
    config = CONFIGS[name]
    reference = random_torch(config)
    sample = Sample.random(config, images, seed=images)
    expected = torch_forward(reference, sample, 0.37).detach().numpy()
    layout, target, given = batch([sample])
    actual = run(ours_from_torch(config, reference), layout, target, jnp.asarray([0.37]), given)
    assert relative(actual[0], expected) <= 1e-5


@pytest.mark.parametrize(
    ("name", "images"), [("two_heads", 0), ("two_heads", 2), ("odd_widths", 1), ("odd_widths", 3), ("one_layer", 2)]
)
def test_parity_gradients(name, images):
    config = CONFIGS[name]
    reference = random_torch(config)
    sample = Sample.random(config, images, seed=3)
    (torch_forward(reference, sample, 0.62) ** 2).mean().backward()
    layout, target, given = batch([sample])

    def loss(model):
        return jnp.mean(model(layout, target, jnp.asarray([0.62]), given) ** 2)

    gradients = tree.to_dict(jax.jit(jax.grad(loss))(ours_from_torch(config, reference)))
    published = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    expected = tensor_names.stack(published, gradients, interop.NAMES)
    errors = {name: relative(gradient, expected[name]) for name, gradient in gradients.items()}
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.parametrize("images", [0, 1, 3])
def test_parity_batch_of_different_prompt_lengths_and_times(images):
    config = CONFIGS["two_heads"]
    reference = random_torch(config)
    samples = [Sample.random(config, images, seed=seed, longer=3 * seed) for seed in range(3)]
    times = [0.1, 0.5, 0.93]
    layout, target, given = batch(samples)
    actual = run(ours_from_torch(config, reference), layout, target, jnp.asarray(times), given)
    for row, sample, t in zip(actual, samples, times, strict=True):
        assert relative(row[: len(sample.target)], torch_forward(reference, sample, t).detach().numpy()) <= 1e-5


@pytest.mark.parametrize("images", [0, 2])
def test_parity_cached_prefix(images):
    """A cached prefix serves all t in a padded batch; results equal those without a cache, and those of diffusers."""
    config = CONFIGS["two_heads"]
    reference = random_torch(config)
    model = ours_from_torch(config, reference)
    samples = [Sample.random(config, images, seed=seed, longer=2 * seed) for seed in range(2)]
    layout, target, given = batch(samples, extra_text=2, extra_image=4, fill=3.0)
    past = jax.jit(MMDiT.prefill, static_argnums=1)(model, layout, given)
    for t in (0.9, 0.2):
        actual = jax.jit(MMDiT.decode, static_argnums=1)(model, layout, target, jnp.full(2, t), given, past)
        for row, sample in zip(actual, samples, strict=True):
            assert relative(row[: len(sample.target)], torch_forward(reference, sample, t).detach().numpy()) <= 1e-5


def test_padding_changes_nothing():
    config = dataclasses.replace(CONFIGS["odd_widths"], layers=2)
    model = ours_from_torch(config, random_torch(config))
    sample = Sample.random(config, 2, seed=5)
    t, size = jnp.asarray([0.4]), len(sample.target)
    layout, target, given = batch([sample])
    tight = run(model, layout, target, t, given)[0]
    layout, target, given = batch([sample], extra_text=7, extra_image=5, fill=50.0)
    assert relative(run(model, layout, target, t, given)[0, :size], tight) <= 1e-5


def plain(model, sample: Sample, t: float):
    """The model written token by token over one unpadded sample, for all options of the configuration."""
    config, leaves = model.config, {name: np.asarray(leaf, np.float64) for name, leaf in tree.to_dict(model).items()}
    layout, _, _ = batch([sample])
    positions, _ = place(layout, [len(x) for x in sample.texts], sample.target_grid, sample.condition_grids)
    weight = lambda name: leaves[name + ".weight"]
    silu = lambda x: x / (1 + np.exp(-x))
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.eps)
    rms = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps) * scale

    def text_in(x):
        x = rms(x, 1 + weight("text_in.norm")) @ weight("text_in.up").T
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x @ weight("text_in.down").T

    def time_in(t):
        angles = 1000 * t * np.exp(-np.log(1e4) * np.arange(128) / 128)
        return silu(np.r_[np.cos(angles), np.sin(angles)] @ weight("time_in.up").T) @ weight("time_in.down").T

    parts, kinds, block = [text_in(sample.texts[0])], [-1] * len(sample.texts[0]), 0
    for condition, text in zip(sample.conditions, sample.texts[1:], strict=True):
        parts += [condition @ weight("image_in").T, text_in(text)]
        kinds += [block] * len(condition) + [-1] * len(text)
        block += 1
    x, kinds = (
        np.concatenate([*parts, sample.target @ weight("image_in").T]),
        np.array(kinds + [block] * len(sample.target)),
    )
    index = np.arange(len(x))
    sees = (index[None] <= index[:, None]) | ((kinds[None] == kinds[:, None]) & (kinds[None] >= 0))
    if config.attention == "bidirectional":
        sees[:] = True
    times = np.where((kinds == block) | (config.condition_timestep == "sampled"), t, 0.0)
    temb = silu(np.stack([time_in(value) for value in times]))
    scale1, gate1, scale2, gate2 = np.split(temb @ weight("modulation").T, 4, axis=-1)

    def rope(x):  # [tokens, heads, width], as complex numbers
        angles = np.concatenate(
            [positions[:, [i]] / 1e4 ** (np.arange(0, d, 2) / d) for i, d in enumerate(config.rope_dims)], axis=1
        )
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    for i in range(config.layers):
        w = lambda name, i=i: weight(f"blocks.{name}")[i]
        y = norm(x) * (1 + scale1)
        heads = lambda m: (y @ m.T).reshape(len(x), config.heads, -1)
        q, k = rope(rms(heads(w("attn.q")), w("attn.q_norm"))), rope(rms(heads(w("attn.k")), w("attn.k_norm")))
        scores = np.einsum("shk,thk->hst", q, k) / np.sqrt(config.head_width)
        scores = np.exp(np.where(sees, scores, -np.inf) - scores.max())
        y = np.einsum("hst,thk->shk", scores / scores.sum(-1, keepdims=True), heads(w("attn.v"))).reshape(len(x), -1)
        x = x + np.tanh(gate1) * (y @ w("attn.out").T)
        y = norm(x) * (1 + scale2)
        x = x + np.tanh(gate2) * ((silu(y @ w("mlp.gate").T) * (y @ w("mlp.up").T)) @ w("mlp.down").T)
    y = norm(x) * (1 + temb @ weight("final_modulation").T)
    return (y @ weight("image_out").T)[-len(sample.target) :]


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
@pytest.mark.parametrize("condition_timestep", ["zero", "sampled"])
def test_rules_against_a_plain_reference(attention, condition_timestep):
    base = CONFIGS["two_heads"]
    config = dataclasses.replace(base, attention=attention, condition_timestep=condition_timestep)
    model = ours_from_torch(config, random_torch(base))
    samples = [Sample.random(config, 2, seed=seed, longer=seed) for seed in (8, 9)]
    layout, target, given = batch(samples, extra_text=1, extra_image=2)
    t = 0.0625  # small and exact: fp32 rounding of the angle 1000 t would hide the comparison with float64
    actual = run(model, layout, target, jnp.full(2, t), given)
    for row, sample in zip(actual, samples, strict=True):
        assert relative(row[: len(sample.target)], plain(model, sample, t)) <= 1e-5


@pytest.mark.parametrize("change", [{"attention": "bidirectional"}, {"condition_timestep": "sampled"}])
def test_cache_is_refused_where_the_prefix_depends_on_the_step(change):
    model = MMDiT(dataclasses.replace(CONFIGS["one_layer"], **change), key=jax.random.key(0))
    layout, _, given = batch([Sample.random(model.config, 0, seed=0)])
    with pytest.raises(ValueError, match="prefix keys and values depend"):
        model.prefill(layout, given)


def test_parameter_count_of_the_7b_preset():
    model = jax.eval_shape(lambda: MMDiT(MMDiTConfig(), key=jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model)) == 7_115_124_736
    with torch.device("meta"):
        reference = QwenImage21Transformer2DModel()
    tensor_names.check(
        {name: tuple(value.shape) for name, value in reference.state_dict().items()},
        {name: leaf.shape for name, leaf in tree.to_dict(model).items()},
        interop.NAMES,
        "transformer",
    )
    assert interop.from_diffusers(reference.config) == MMDiTConfig()
