"""Gradients do not depend on the mesh, on what is kept, or on how images are spread over the chips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipeline.loading.batch import Batch
from qi2_jax import sharding
from qi2_jax.diffusion.timesteps import LogitNormal, Shift
from qi2_jax.models import tree
from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.models.recomputation import WORKING
from qi2_jax.sequence import Layout, place
from qi2_jax.tasks.transformer.config import ExecutionConfig
from qi2_jax.tasks.transformer.execution import divided_of, training_execution
from qi2_jax.tasks.transformer.objective import Objective, make_loss
from qi2_jax.training.step import init_state, make_programs

CONFIG = MMDiTConfig(2, 4, 16, 2, 4, 8, (4, 6, 6))
LAYOUT = Layout((3, 3), 6, (4,))
IMAGES = 8


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    made = MMDiT(CONFIG, key=jax.random.key(0))
    # Random weights everywhere: the modulation and the output would start at zero.
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape, scale=0.1), leaf.dtype), made)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    draw = lambda *shape: np.asarray(rng.normal(size=(IMAGES, *shape)), np.float32)
    positions, valid = place(LAYOUT, (2, 2), (2, 2), [(2, 1)])
    given = Conditioning(draw(6, 8), np.stack([positions] * IMAGES), np.stack([valid] * IMAGES), draw(4, 4))
    return Batch(draw(6, 4), given)


def updated(model, batch, mesh, execution, images=IMAGES):
    """Parameters and metrics after an update with a plain gradient step."""
    optimizer = optax.sgd(1.0)
    state = init_state(lambda key: MMDiT(CONFIG, key=key), optimizer, jax.random.key(0), mesh)
    state = state._replace(model=jax.device_put(model, sharding.shardings(model, mesh)))
    loss = make_loss(LogitNormal(), Objective(Shift(), execution))
    step = make_programs(loss, optimizer, 0.9, 3, mesh, replicas=mesh.shape["data"]).step
    state, metrics = step(state, None, LAYOUT, sharding.put_batch(mesh, batch, images))
    return tree.to_dict(jax.device_get(state.model)), float(metrics["loss"])


@pytest.fixture(scope="module")
def expected(model, batch):
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    return updated(model, batch, mesh, Execution(kernel="reference"))


@pytest.mark.parametrize(
    ("shape", "divided", "config"),
    [
        (sharding.MeshShape(data=2, fsdp=2, tensor=2), "images", dict(keep="fit", activations_gib=1.0)),
        (sharding.MeshShape(data=2, fsdp=1, tensor=4), "images", dict(keep="gate", blocks_per_step=2)),
        (sharding.MeshShape(data=4, fsdp=2), "heads", dict(keep="fit", activations_gib=0.0)),
        (sharding.MeshShape(fsdp=8), "heads", dict(keep="attention")),
        (sharding.MeshShape(data=2, fsdp=4), "heads", dict(keep="host")),
    ],
)
def test_gradients_are_those_of_one_device(model, batch, expected, shape, divided, config):
    mesh = sharding.make_mesh(shape, jax.devices())
    config = ExecutionConfig(dtype=jnp.dtype("float32"), kernel="chunked", remat=True, **config)
    execution = training_execution(config, CONFIG, LAYOUT, IMAGES // shape.data, mesh)
    assert execution.gather.divided == divided
    parameters, loss = updated(model, batch, mesh, execution)
    assert loss == pytest.approx(expected[1], rel=1e-5)
    for name, leaf in parameters.items():
        np.testing.assert_allclose(leaf, expected[0][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_program_keeps_what_fits():
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=8), jax.devices())
    config = ExecutionConfig(dtype=jnp.dtype("float32"), kernel="chunked", remat=True, keep="fit")
    unit = LAYOUT.length * CONFIG.width * 4 / 2**30  # one value per token and unit of width, in GiB
    gib = lambda kept: (kept * CONFIG.layers + WORKING) * unit
    kept = [
        training_execution(dataclasses.replace(config, activations_gib=gib(size)), CONFIG, LAYOUT, 8, mesh).keep
        for size in (0, 1.01, 2.01, 7.01, 9.01, 11.01)
    ]
    assert kept == ["inputs", "inputs", "attention", "projections", "gate", "hidden"]
    # With fewer images at once, each takes more.
    half = dataclasses.replace(config, activations_gib=gib(7.01))
    assert training_execution(half, CONFIG, LAYOUT, 4, mesh).keep == "hidden"


def test_the_tokens_are_divided_where_there_are_fewer_images_than_chips(model, batch):
    """Two images on eight chips: each chip computes a part of one image's tokens, with the same gradients."""
    few = jax.tree.map(lambda leaf: leaf[:2], batch)
    found = []
    for shape, keep in (
        (sharding.MeshShape(), "attention"),
        (sharding.MeshShape(fsdp=2, tensor=4), "attention"),
        (sharding.MeshShape(data=2, tensor=4), "host"),
    ):
        mesh = sharding.make_mesh(shape, jax.devices()[: shape.size])
        config = ExecutionConfig(dtype=jnp.dtype("float32"), kernel="chunked", remat=True, keep=keep, blocks_per_step=2)
        execution = training_execution(config, CONFIG, LAYOUT, 2 // shape.data, mesh)
        assert execution.gather.divided == ("sequence" if shape.size > 1 else "heads")
        found.append(updated(model, few, mesh, execution, 2))
    for parameters, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        for name, leaf in parameters.items():
            np.testing.assert_allclose(leaf, found[0][0][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_tokens_are_divided_if_heads_can_be(model):
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, tensor=4), jax.devices())
    assert divided_of(CONFIG, LAYOUT, 2, mesh) == "sequence"
    assert divided_of(dataclasses.replace(CONFIG, heads=2), LAYOUT, 2, mesh) == "heads"
    assert divided_of(CONFIG, dataclasses.replace(LAYOUT, target=5), 2, mesh) == "heads"
    assert divided_of(CONFIG, LAYOUT, 8, mesh) == "images"


def test_sums_in_float32_are_more_exact(model, batch, expected):
    """Computed in bf16 on eight devices: the gradients of matrices are closer to those in fp32."""
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=8), jax.devices())
    errors = []
    for dtype in ("float32", "bfloat16"):
        config = ExecutionConfig(
            dtype=jnp.dtype("bfloat16"), kernel="reference", remat=True, shard_sum=jnp.dtype(dtype)
        )
        parameters, _ = updated(model, batch, mesh, training_execution(config, CONFIG, LAYOUT, IMAGES, mesh))
        name = next(name for name in parameters if name.endswith("mlp.down.weight"))
        before = tree.to_dict(model)[name]
        right, found = expected[0][name] - before, parameters[name] - before
        errors.append(float(np.linalg.norm(found - right) / np.linalg.norm(right)))
    assert errors[0] < errors[1] < 0.05
