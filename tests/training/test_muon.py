"""Muon: which weights it trains and as which matrices, where its state lives, and that it resumes bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qi2_jax import sharding
from qi2_jax.models import tree
from qi2_jax.models.layers import Linear, keys, stacked
from qi2_jax.models.vae_blocks import ChannelNorm, Conv2d
from qi2_jax.training import step as steps
from tests.training import toy
from tests.training.test_step import FROZEN, OPTIMIZER, Toy, batch, loss

MUON = dataclasses.replace(OPTIMIZER, kind="muon", adam_lr=0.02, warmup=0, clip=1e9)


class Mixed(nnx.Module):
    """A convolution, a norm whose scale is stored as [C, 1, 1, 1], and a stack of linear layers."""

    def __init__(self, key):
        rng = keys(key)
        self.conv = Conv2d(3, 6, 3, key=next(rng))
        self.norm = ChannelNorm(6)
        self.blocks = stacked(lambda key: Linear(4, 10, key=key, axes=("mlp", "embed")), 2, next(rng))


def orthogonalized(gradient_OI):
    """One step of Muon on a matrix of outputs by inputs: five Newton-Schulz iterations, scaled by its shape."""
    x = np.asarray(gradient_OI, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x * max(1, x.shape[0] / x.shape[1]) ** 0.5


def test_a_convolution_is_one_matrix_each_layer_of_a_stack_another_and_a_norm_is_left_to_adam():
    model = Mixed(jax.random.key(0))
    optimizer = steps.make_optimizer(dataclasses.replace(MUON, weight_decay=0.0))
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), model)
    updates, _ = optimizer.update(gradients, optimizer.init(model), model)
    found, wanted = tree.to_dict(updates), tree.to_dict(gradients)
    conv = orthogonalized(wanted["conv.weight"].reshape(6, 27)).reshape(6, 3, 3, 3)
    np.testing.assert_allclose(found["conv.weight"], -MUON.lr * conv, atol=1e-4)
    for layer in range(2):
        expected = -MUON.lr * orthogonalized(wanted["blocks.weight"][layer])
        np.testing.assert_allclose(found["blocks.weight"][layer], expected, atol=1e-4)
    adam = optax.adam(MUON.adam_lr, *MUON.betas, MUON.eps, nesterov=True)
    for name in ("conv.bias", "norm.gamma"):
        np.testing.assert_allclose(found[name], adam.update(wanted[name], adam.init(wanted[name]))[0], atol=1e-7)


def test_weight_decay_spares_what_adam_trains():
    model = jax.tree.map(lambda leaf: leaf + 1.0, Mixed(jax.random.key(0)))
    optimizer = steps.make_optimizer(MUON)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
    decayed = {name for name, update in tree.to_dict(updates).items() if np.abs(update).max() > 0}
    assert decayed == {"conv.weight", "blocks.weight"}


def test_its_state_is_sharded_as_the_parameters_and_the_shape_of_no_program_changes():
    mesh = sharding.make_mesh(sharding.MeshShape(2, 2, 2))
    optimizer = steps.make_optimizer(MUON)
    programs = steps.make_programs(loss, optimizer, 0.75, seed=3, mesh=mesh)
    state = steps.init_state(Toy, optimizer, jax.random.key(0), mesh)
    wanted = {name: leaf.sharding for name, leaf in tree.to_dict(steps.abstract_state(Toy, optimizer, mesh)).items()}
    muon, adam = (f"optimizer.1.inner_states.{rule}.inner_state.0.mu." for rule in ("muon", "adam"))
    assert wanted[f"{muon}down.weight"].spec == jax.P("fsdp", "tensor")
    assert wanted[f"{adam}up.bias"].spec == jax.P("tensor") and f"{adam}up.weight" not in wanted
    for _ in range(2):
        assert {name: leaf.sharding for name, leaf in tree.to_dict(state).items()} == wanted
        state, metrics = programs.step(state, FROZEN, None, batch(mesh))
    assert programs.step._cache_size() == 1 and np.isfinite(float(metrics["update_norm"]))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    config = toy.config(steps=4)
    config.optimizer.update(kind="muon", adam_lr=0.02)
    whole = toy.train(toy.task(), config, tmp_path / "whole")
    config.train.steps = 2
    toy.train(toy.task(), config, tmp_path / "resumed")
    config.train.steps = 4
    resumed = toy.train(toy.task(), config, tmp_path / "resumed")
    assert toy.kinds(tmp_path / "resumed").count("compile") == 2
    for name, leaf in tree.to_dict(whole).items():
        np.testing.assert_array_equal(tree.to_dict(resumed)[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lion"}, r"kind is 'lion'; choose one of \['adam', 'muon'\]"),
        ({"kind": "muon", "adam_lr": 0.0}, "adam_lr is 0.0 with kind 'muon'; it must be above 0"),
        ({"kind": "adam", "adam_lr": 0.1}, "adam_lr is 0.1 with kind 'adam'"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MUON, **changes)
