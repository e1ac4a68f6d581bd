"""Adapters joined with and merged into the transformer; tests/interop/lora compares them with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qi2_jax import sharding
from qi2_jax.models import lora, tree
from qi2_jax.models.lora import LoRAConfig
from qi2_jax.models.mmdit import Execution, MMDiT, MMDiTConfig
from qi2_jax.tasks.transformer.objective import compute_copy
from tests.models.test_mmdit import Sample, batch, relative, run

CONFIG = MMDiTConfig(2, 2, 16, 3, 64, 24, (4, 6, 6))
ALL = LoRAConfig(4, 6.0, ("*",))


def random_like(model, seed, scale=1.0):
    """Random values of the magnitude that a trained model has."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale * leaf.shape[-1] ** -0.5, jnp.float32)
    return jax.tree.map(draw, model)


@pytest.fixture(scope="module")
def base():
    return random_like(MMDiT(CONFIG, key=jax.random.key(0)), 0)


@pytest.fixture(scope="module")
def adapter(base):
    # If the changes were larger than the weights, rounding would dominate bf16 gradients.
    return random_like(lora.init(base, ALL, key=jax.random.key(1)), 1, 0.5)


@pytest.fixture(scope="module")
def inputs():
    layout, target, given = batch([Sample.random(CONFIG, 1, seed) for seed in (0, 1)])
    return layout, target, jnp.asarray([0.3, 0.8]), given


def squares(adapter, base, inputs, execution=Execution()):
    layout, target, t, given = inputs
    return jnp.mean(compute_copy(lora.join(base, adapter), execution)(layout, target, t, given, execution) ** 2)


def grad(adapter, base, inputs, execution=Execution()):
    layout, *arrays = inputs
    function = lambda adapter, base, arrays: squares(adapter, base, (layout, *arrays), execution)
    return jax.jit(jax.grad(function))(adapter, base, arrays)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(("blocks.attn.q",), 1), (("blocks.attn.*",), 4), (("blocks.*", "blocks.mlp.up", "modulation"), 8), (("*",), 15)],
)
def test_targets(base, patterns, count):
    found = lora.targets(base, LoRAConfig(4, 4, patterns))
    assert len(found) == len(set(found)) == count
    assert set(found) <= lora.linears(base).keys()


def test_a_target_that_matches_nothing_is_refused(base):
    config = LoRAConfig(4, 4, ("blocks.attn.q", "blocks.attn.to_q", "text.*", "blocks.attn.q_norm"))
    with pytest.raises(ValueError, match=r"\['blocks.attn.to_q', 'text.\*', 'blocks.attn.q_norm'\] match") as error:
        lora.init(base, config, key=jax.random.key(0))
    assert all(path in str(error.value) for path in lora.linears(base))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((0, 1.0, ("*",)), "rank is 0"),
        ((True, 1.0, ("*",)), "rank is True"),
        ((4, 0.0, ("*",)), "alpha is 0.0"),
        ((4, float("inf"), ("*",)), "alpha is inf"),
        ((4, "8", ("*",)), "alpha is '8'"),
        ((4, 8, ()), r"targets are \(\)"),
        ((4, 8, "*"), r"targets are '\*'"),
        ((4, 8, (1,)), r"targets are \(1,\)"),
    ],
)
def test_values_out_of_range_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        LoRAConfig(*values)


def test_a_fresh_adapter_changes_nothing(base, inputs):
    fresh = lora.init(jax.eval_shape(lambda: base), ALL, key=jax.random.key(3))
    np.testing.assert_array_equal(run(lora.join(base, fresh), *inputs), run(base, *inputs))
    for name, leaf in tree.to_dict(fresh).items():
        assert leaf.dtype == jnp.float32
        assert ("lora_A" in name) == bool(jnp.any(leaf))
    assert not jnp.array_equal(*fresh["blocks.attn.q"].lora_A.weight[...])  # layers are drawn one by one
    a = lora.init(base, LoRAConfig(64, 1, ("blocks.*",)), key=jax.random.key(3))["blocks.mlp.down"].lora_A.weight[...]
    assert np.std(a) == pytest.approx((3 * a.shape[-1]) ** -0.5, rel=0.05)


def test_shapes_and_names(base):
    found = {name: leaf.shape for name, leaf in tree.to_dict(lora.abstract(base, ALL)).items()}
    assert found["blocks.mlp.up.lora_A.weight"] == (2, 4, 32)
    assert found["blocks.mlp.up.lora_B.weight"] == (2, 96, 4)
    assert found["modulation.lora_B.weight"] == (128, 4)
    assert len(found) == 2 * 15


def test_joined_and_merged_models_agree(base, adapter, inputs):
    joined, merged = run(lora.join(base, adapter), *inputs), run(lora.merge(base, adapter), *inputs)
    assert relative(joined, merged) <= 1e-5
    assert relative(run(base, *inputs), merged) > 0.1
    assert jax.tree.structure(lora.merge(base, adapter)) == jax.tree.structure(base)


def test_a_merged_model_keeps_its_dtype(base, adapter):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    merged = tree.to_dict(lora.merge(narrow, adapter))
    wide = tree.to_dict(lora.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow), adapter))
    for name, leaf in merged.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wide[name].astype(jnp.bfloat16))


def test_an_adapter_of_other_layers_is_refused(base, adapter):
    with pytest.raises(ValueError, match=r"changes \['blocks.attn.to_q'\]; the model has"):
        lora.join(base, {"blocks.attn.to_q": adapter["blocks.attn.q"]})


def test_gradients_of_joined_and_merged_models_agree(base, adapter, inputs):
    joined = grad(adapter, base, inputs)
    layout, *arrays = inputs
    merged = jax.jit(
        jax.grad(lambda adapter: jnp.mean(lora.merge(base, adapter)(layout, *arrays) ** 2)),
    )(adapter)
    for name, want in tree.to_dict(merged).items():
        assert relative(tree.to_dict(joined)[name], want) <= 1e-4, name


def test_bf16_with_remat_and_a_bf16_base(base, adapter, inputs):
    """As on a pod: gradients are fp32 and close to those of a computation in fp32."""
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    found = tree.to_dict(grad(adapter, narrow, inputs, Execution(jnp.bfloat16, remat=True)))
    for name, want in tree.to_dict(grad(adapter, base, inputs)).items():
        assert found[name].dtype == jnp.float32
        cosine = jnp.vdot(found[name], want) / jnp.linalg.norm(found[name]) / jnp.linalg.norm(want)
        assert cosine > 0.995, name


def computed_shapes(jaxpr):
    """Shapes of all intermediate results of a program and of the programs within it."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {out.aval.shape for out in equation.outvars if hasattr(out.aval, "shape")}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                shapes |= computed_shapes(inner)
    return shapes


def test_joining_forms_neither_changes_nor_gradients_of_the_base(base, inputs):
    """Nothing with the shape of a block's weight is computed, neither for one layer nor for the stack."""
    layout, target, t, given = inputs
    adapter = lora.init(base, LoRAConfig(4, 4.0, ("blocks.*",)), key=jax.random.key(0))

    def shapes_with(combine):
        squares = lambda adapter: jnp.mean(combine(base, adapter)(layout, target, t, given, Execution(remat=True)) ** 2)
        return computed_shapes(jax.make_jaxpr(jax.grad(squares))(adapter))

    weights = {leaf.shape for name, leaf in tree.to_dict(base).items() if name.startswith("blocks.mlp")}
    weights |= {shape[1:] for shape in weights}
    assert shapes_with(lora.merge) & weights, "merging forms the changes"
    assert {(2, layout.length, 4), (2, 4, 32)} <= shapes_with(lora.join), "A x of a layer, and the gradient of A"
    assert not shapes_with(lora.join) & weights


def test_adapters_are_sharded_like_their_layers(base, adapter, inputs):
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2, tensor=2), jax.devices()[:4])
    places = sharding.shardings(adapter, mesh)
    up, down = places["blocks.mlp.up"], places["blocks.mlp.down"]
    assert up.lora_A.weight.spec == PartitionSpec(None, None, ("fsdp",))
    assert up.lora_B.weight.spec == PartitionSpec(None, ("tensor",))
    assert down.lora_A.weight.spec == PartitionSpec(None, None, ("tensor",))
    assert down.lora_B.weight.spec == PartitionSpec(None, ("fsdp",))
    placed = jax.device_put(adapter, places)
    spread = jax.device_put(base, sharding.shardings(base, mesh))
    execution = Execution(jnp.float32, sharding.Attention(mesh), True, constrain=sharding.Constrain(mesh))
    found = tree.to_dict(grad(placed, spread, inputs, execution))
    for name, want in tree.to_dict(grad(adapter, base, inputs)).items():
        assert relative(found[name], want) <= 1e-4, name
