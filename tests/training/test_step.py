"""The training step on a toy model: what a bad batch may change, weight decay, the average, placement."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qi2_jax import sharding, tree
from qi2_jax.models.layers import Linear, RMSNorm, keys
from qi2_jax.training import step as steps

OPTIMIZER = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, clip=1.0, warmup=2, decay_steps=0)


class Toy(nnx.Module):
    def __init__(self, key):
        rng = keys(key)
        self.up = Linear(8, 16, key=next(rng), axes=("mlp", "embed"), bias=True)
        self.norm = RMSNorm(16)
        self.down = Linear(16, 8, key=next(rng), axes=("embed", "mlp"))

    def __call__(self, x):
        return self.down(self.norm(self.up(x)))


def loss(model, static, batch, key):
    return jnp.mean((model(batch) - batch) ** 2), {"drawn": jax.random.uniform(key)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshShape(2, 2, 2))


@pytest.fixture(scope="module")
def optimizer():
    return steps.make_optimizer(OPTIMIZER)


@pytest.fixture(scope="module")
def train_step(mesh, optimizer):
    return steps.make_train_step(loss, optimizer, 0.75, seed=3, mesh=mesh)


@pytest.fixture
def state(mesh, optimizer):
    return steps.init_state(Toy, optimizer, jax.random.key(0), mesh)


def host(state):
    return {name: np.asarray(leaf) for name, leaf in tree.to_dict(state).items()}


def batch(mesh, value=None):
    rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    return sharding.put_batch(mesh, rows if value is None else np.full_like(rows, value), len(rows))


def test_step_equals_optax_on_one_device(mesh, optimizer, train_step, state):
    before = jax.tree.map(np.asarray, state)
    after, metrics = train_step(state, None, batch(mesh))
    gradients = jax.grad(lambda model: loss(model, None, np.asarray(batch(mesh)), jax.random.key(0))[0])(before.model)
    updates, _ = optimizer.update(gradients, before.optimizer, before.model)
    model = optax.apply_updates(before.model, updates)
    for name, leaf in tree.to_dict(model).items():
        np.testing.assert_allclose(host(after)[f"model.{name}"], leaf, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
    assert int(after.step) == 1 and int(after.skipped) == 0


def test_ema_moves_a_quarter_of_the_way(mesh, train_step, state):
    state, _ = train_step(state, None, batch(mesh))  # warm-up: the first rate is 0
    before = host(state)
    after = host(train_step(state, None, batch(mesh))[0])
    moved = 0.0
    for name in (name for name in after if name.startswith("ema.")):
        raw = after[name.replace("ema.", "model.")]
        np.testing.assert_allclose(after[name], before[name] + 0.25 * (raw - before[name]), atol=1e-6)
        moved = max(moved, float(np.abs(after[name] - before[name]).max()))
    assert moved > 1e-3


def test_a_batch_that_is_not_finite_changes_only_counters(mesh, train_step, state):
    state, _ = train_step(state, None, batch(mesh))
    before = host(state)
    state, metrics = train_step(state, None, batch(mesh, np.nan))
    after = host(state)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"step", "skipped"} and int(metrics["skipped"]) == 1
    state, metrics = train_step(state, None, batch(mesh))
    assert int(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))


def test_weight_decay_spares_norms_and_biases(mesh, optimizer, state):
    zero = jax.tree.map(jnp.zeros_like, state.model)
    moments = state.optimizer
    for _ in range(2):
        updates, moments = optimizer.update(zero, moments, state.model)
    decayed = {name for name, update in tree.to_dict(updates).items() if np.abs(update).max() > 0}
    assert decayed == {"up.weight", "down.weight"}


def test_every_leaf_lives_where_the_table_says_before_and_after(mesh, train_step, state):
    def specs(state):
        return {name: leaf.sharding.spec for name, leaf in tree.to_dict(state).items()}

    before = specs(state)
    assert before["model.up.weight"] == before["ema.up.weight"] == jax.P("tensor", "fsdp")
    assert before["optimizer.1.0.mu.down.weight"] == jax.P("fsdp", "tensor")
    state, _ = train_step(state, None, batch(mesh))
    compiled = train_step._cache_size()
    state, _ = train_step(state, None, batch(mesh))
    assert specs(state) == before and train_step._cache_size() == compiled


def test_randomness_depends_on_seed_and_step_only(mesh, train_step, state):
    drawn = []
    for _ in range(2):
        state, metrics = train_step(state, None, batch(mesh))
        drawn.append(float(metrics["drawn"]))
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(3), step))) for step in range(2)]
    assert drawn == expected


def test_mesh_of_another_size_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"needs 6 devices, but 8 are present.*xla_force_host_platform_device_count=6"):
        sharding.make_mesh(sharding.MeshShape(3, 2, 1))


def test_batch_that_does_not_split_over_the_mesh_is_refused(mesh):
    with pytest.raises(ValueError, match="a batch of 6 does not split over data x fsdp = 4 devices"):
        sharding.own_rows(mesh, 6)


def test_each_row_of_a_batch_is_put_where_the_mesh_wants_it(mesh):
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    placed = sharding.put_batch(mesh, rows, 8)
    assert sharding.own_rows(mesh, 8) == tuple(range(8)) and np.array_equal(placed, rows)
    for shard in placed.addressable_shards:
        assert np.array_equal(shard.data, rows[shard.index])
