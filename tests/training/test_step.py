"""The training step on a toy model: skipped updates, weight decay, EMA, gradient accumulation, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qi2_jax import sharding
from qi2_jax.models import tree
from qi2_jax.models.layers import Linear, RMSNorm, keys, stacked
from qi2_jax.training import step as steps
from qi2_jax.training.compiled import Compiled
from qi2_jax.training.microbatch import Microbatch
from qi2_jax.training.optimizer import Optimizer

OPTIMIZER = Optimizer(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, clip=1.0, warmup=2, decay_steps=0)


class Toy(nnx.Module):
    def __init__(self, key):
        rng = keys(key)
        self.up = Linear(8, 16, key=next(rng), axes=("mlp", "embed"), bias=True)
        self.norm = RMSNorm(16)
        self.down = Linear(16, 8, key=next(rng), axes=("embed", "mlp"))

    def __call__(self, x):
        return self.down(self.norm(self.up(x)))


def loss(model, frozen, static, batch, keys_B):
    drawn_B = jax.vmap(jax.random.uniform)(keys_B)
    noisy = batch * (1 + drawn_B[:, None])
    return jnp.mean((model(noisy) - frozen * batch) ** 2), {"drawn": jnp.mean(drawn_B)}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshShape(2, 2, 2))


@pytest.fixture(scope="module")
def optimizer():
    return steps.make_optimizer(OPTIMIZER)


@pytest.fixture(scope="module")
def programs(mesh, optimizer):
    return steps.make_programs(loss, optimizer, 0.75, seed=3, mesh=mesh)


FROZEN = np.float32(0.5)


@pytest.fixture(scope="module")
def train_step(programs):
    return lambda state, static, batch: programs.step(state, FROZEN, static, batch)


@pytest.fixture
def state(mesh, optimizer):
    return steps.init_state(Toy, optimizer, jax.random.key(0), mesh)


def host(state):
    return {name: np.asarray(leaf) for name, leaf in tree.to_dict(state).items()}


def keys_of(step, images):
    key = jax.random.fold_in(jax.random.key(3), step)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(images))


def batch(mesh, value=None):
    rows = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    return sharding.put_batch(mesh, rows if value is None else np.full_like(rows, value), len(rows))


def test_step_equals_optax_on_one_device(mesh, optimizer, train_step, state):
    before = jax.tree.map(np.asarray, state)
    after, metrics = train_step(state, None, batch(mesh))
    gradients = jax.grad(lambda model: loss(model, FROZEN, None, np.asarray(batch(mesh)), keys_of(0, 8))[0])(
        before.model
    )
    updates, _ = optimizer.update(gradients, before.optimizer, before.model)
    model = optax.apply_updates(before.model, updates)
    for name, leaf in tree.to_dict(model).items():
        np.testing.assert_allclose(host(after)[f"model.{name}"], leaf, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradients), rtol=1e-5)
    assert int(after.step) == 1 and int(after.skipped) == 0


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("decay_steps", [0, 10])
def test_the_rate_rises_from_the_first_update_on_and_no_update_is_without(warmup, decay_steps):
    rate = steps.learning_rate(dataclasses.replace(OPTIMIZER, warmup=warmup, decay_steps=decay_steps))
    found = [float(rate(update)) for update in range(10)]
    assert found[:warmup] == pytest.approx([0.1 * (update + 1) / warmup for update in range(warmup)])
    share = (np.arange(10) - warmup)[warmup:] / (10 - warmup)
    after = 0.05 * (1 + np.cos(np.pi * share)) if decay_steps else np.full(10 - warmup, 0.1)
    assert found[warmup:] == pytest.approx(after) and min(found) > 0
    if decay_steps:
        assert float(rate(decay_steps)) == pytest.approx(0, abs=1e-9)


def test_ema_moves_a_quarter_of_the_way(mesh, train_step, state):
    before = host(state)
    after = host(train_step(state, None, batch(mesh))[0])
    moved = 0.0
    for name in (name for name in after if name.startswith("ema.")):
        raw = after[name.replace("ema.", "model.")]
        np.testing.assert_allclose(after[name], before[name] + 0.25 * (raw - before[name]), atol=1e-6)
        moved = max(moved, float(np.abs(after[name] - before[name]).max()))
    assert moved > 1e-3


def test_an_ema_that_ramps_up_counts_only_updates_that_were_not_skipped(mesh, optimizer, state):
    """The ramp depends on the state alone: a skipped step changes neither the EMA nor the ramp."""
    ramped = steps.make_programs(loss, optimizer, 0.3, seed=3, mesh=mesh, ema_ramp=True)
    decays = [min(0.3, (1 + n) / (10 + n)) for n in range(4)]
    assert decays[0] == 0.1 and decays[-1] == 0.3
    for spoilt, decay in zip((None, None, np.nan, None, None), [*decays[:2], 1.0, *decays[2:]], strict=True):
        before = host(state)
        state, _ = ramped.step(state, FROZEN, None, batch(mesh, spoilt))
        after = host(state)
        for name in (name for name in after if name.startswith("ema.")):
            raw = after[name.replace("ema.", "model.")]
            np.testing.assert_allclose(after[name], decay * before[name] + (1 - decay) * raw, atol=1e-6, err_msg=name)


def test_a_batch_that_is_not_finite_changes_only_counters(mesh, train_step, state):
    state, _ = train_step(state, None, batch(mesh))
    before = host(state)
    state, metrics = train_step(state, None, batch(mesh, np.nan))
    after = host(state)
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"step", "skipped", "skipped_total"} and int(metrics["skipped"]) == 1
    state, metrics = train_step(state, None, batch(mesh))
    assert int(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))
    assert int(metrics["skipped_total"]) == 1


@pytest.mark.parametrize("changes", [dict(), dict(kind="muon", adam_lr=0.02)], ids=["adam", "muon"])
def test_parameters_that_a_layout_does_not_train_keep_every_bit(mesh, changes):
    """With momentum left over from other layouts, and with weight decay; they do not count in the clipped norm."""
    optimizer = steps.make_optimizer(dataclasses.replace(OPTIMIZER, warmup=0, **changes))

    def trained(layout):
        return (lambda name: name.startswith("down.")) if layout == "down" else None

    programs = steps.make_programs(loss, optimizer, 0.75, seed=3, mesh=mesh, trained=trained)
    state = steps.init_state(Toy, optimizer, jax.random.key(0), mesh)
    state, _ = programs.step(state, FROZEN, None, batch(mesh))
    before = host(state)
    state, metrics = programs.step(state, FROZEN, "down", batch(mesh))
    after = host(state)
    weights = [name for name in after if name.startswith("model.")]
    changed = {name for name in weights if after[name].tobytes() != before[name].tobytes()}
    assert changed == {"model.down.weight"} and len(weights) == 4
    assert metrics["gradient_norm"] == metrics["gradient_norm/down"] > 0
    assert metrics["update_norm"] == metrics["update_norm/down"] > 0
    moved = after["ema.up.weight"] - before["ema.up.weight"]
    np.testing.assert_allclose(moved, 0.25 * (after["model.up.weight"] - before["ema.up.weight"]), atol=1e-6)
    with pytest.raises(ValueError, match="a batch of down trains only some parameters, so it must be a whole update"):
        programs.add.lower(state, steps.Sums(None, None, {}), FROZEN, "down", batch(mesh), jnp.int32(0), jnp.float32(1))


def test_weight_decay_spares_norms_and_biases(mesh, optimizer, state):
    zero = jax.tree.map(jnp.zeros_like, state.model)
    updates, _ = optimizer.update(zero, state.optimizer, state.model)
    decayed = {name for name, update in tree.to_dict(updates).items() if np.abs(update).max() > 0}
    assert decayed == {"up.weight", "down.weight"}


def test_every_leaf_lives_where_the_table_says_before_and_after(mesh, programs, train_step, state):
    def specs(state):
        return {name: leaf.sharding.spec for name, leaf in tree.to_dict(state).items()}

    before = specs(state)
    assert before["model.up.weight"] == before["ema.up.weight"] == jax.P("tensor", "fsdp")
    assert before["optimizer.1.0.mu.down.weight"] == jax.P("fsdp", "tensor")
    state, _ = train_step(state, None, batch(mesh))
    compiled = programs.step._cache_size()
    state, _ = train_step(state, None, batch(mesh))
    assert specs(state) == before and programs.step._cache_size() == compiled


def test_randomness_depends_on_seed_step_and_image_only(mesh, train_step, state):
    drawn = []
    for _ in range(2):
        state, metrics = train_step(state, None, batch(mesh))
        drawn.append(float(metrics["drawn"]))
    expected = [float(jnp.mean(jax.vmap(jax.random.uniform)(keys_of(step, 8)))) for step in range(2)]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def microbatches_of(mesh, rows, sizes):
    ends = np.cumsum(sizes)
    return [
        Microbatch(
            None if size == 4 else "large",
            sharding.put_batch(mesh, rows[end - size : end], size),
            end - size,
            size / len(rows),
        )
        for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("sizes", [(4, 4), (8,), (4, 8, 4)])
def test_gradient_accumulation_equals_the_large_batch(mesh, programs, optimizer, train_step, state, sizes):
    """Microbatches of unequal sizes and several programs, as where areas or tasks mix within an update."""
    rows = np.random.default_rng(1).normal(size=(sum(sizes), 8)).astype(np.float32)
    state, _ = train_step(state, None, sharding.put_batch(mesh, rows, len(rows)))  # Adam's first update is just a sign
    examples = microbatches_of(mesh, np.zeros((12, 8), np.float32), (4, 8))
    update = Compiled(programs, state, FROZEN, examples, True, mesh)
    copy = jax.tree.map(jnp.copy, state)
    whole, of_whole = train_step(state, None, sharding.put_batch(mesh, rows, len(rows)))
    split, of_parts = update(copy, FROZEN, microbatches_of(mesh, rows, sizes))
    for name, leaf in host(whole).items():
        np.testing.assert_allclose(host(split)[name], leaf, rtol=2e-5, atol=1e-6, err_msg=name)
    assert of_whole.keys() == of_parts.keys()
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    poisoned, metrics = update(
        split, FROZEN, microbatches_of(mesh, np.where(np.arange(len(rows))[:, None] == 1, np.nan, rows), sizes)
    )
    assert int(poisoned.skipped) == 1 and not np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_batch_of_another_shape_is_an_error_that_names_it(mesh, programs, state, accumulate):
    (example,) = microbatches_of(mesh, np.zeros((4, 8), np.float32), (4,))
    update = Compiled(programs, state, FROZEN, [example], accumulate, mesh)
    (larger,) = microbatches_of(mesh, np.zeros((8, 8), np.float32), (8,))
    for other in (larger, larger._replace(layout=None)):
        with pytest.raises(ValueError, match=r"float32\[8, 8\].*\n.*float32\[4, 8\]"):
            update(state, FROZEN, [other])


def test_norms_of_groups_add_up(mesh, state):
    stack = stacked(lambda key: Toy(key), 12, jax.random.key(1))
    found = steps.norms("norm", {"blocks": stack, "end": state.model.down})
    assert {name for name in found if name.startswith("norm/blocks")} == {
        f"norm/blocks_{i:02d}-{i + 1:02d}" for i in range(0, 12, 2)
    }
    own = float(optax.tree.norm(jax.tree.map(lambda leaf: leaf[2:4], stack)))
    assert float(found["norm/blocks_02-03"]) == pytest.approx(own, rel=1e-6)
    groups = sum(float(value) ** 2 for name, value in found.items() if "/" in name)
    assert float(found["norm"]) ** 2 == pytest.approx(groups, rel=1e-6)


def test_mesh_of_another_size_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"needs 6 devices, but 8 are present.*xla_force_host_platform_device_count=6"):
        sharding.make_mesh(sharding.MeshShape(3, 2, 1))


def test_batch_that_does_not_split_over_the_mesh_is_refused(mesh):
    with pytest.raises(ValueError, match="a batch of 6 does not split over data x fsdp = 4 devices"):
        sharding.local_rows(mesh, 6)


def test_each_row_of_a_batch_is_put_where_the_mesh_wants_it(mesh):
    rows = np.arange(8)[:, None] * np.ones((1, 3))
    placed = sharding.put_batch(mesh, rows, 8)
    assert sharding.local_rows(mesh, 8) == tuple(range(8)) and np.array_equal(placed, rows)
    for shard in placed.addressable_shards:
        assert np.array_equal(shard.data, rows[shard.index])
