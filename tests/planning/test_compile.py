"""The training step of a tiny transformer, compiled for TPU chips that are not attached."""

import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from qi2_jax import sharding
from qi2_jax.models.mmdit import MMDiT, MMDiTConfig
from qi2_jax.planning.compile import Trainer, memory_of, topology_mesh
from qi2_jax.planning.programs import plan_program
from qi2_jax.runtime.chips import chip_of
from qi2_jax.sequence import Layout
from qi2_jax.tasks.devices import make_mesh
from qi2_jax.tasks.transformer.config import ExecutionConfig
from qi2_jax.workflows.config import load_experiment
from tests.tpu import needs_libtpu

CONFIG = MMDiTConfig(layers=3, heads=2, head_width=32, text_width=48, rope_dims=(8, 12, 12))
LAYOUT = Layout((40,), 100)


def trainer(mesh, **execution):
    config = ExecutionConfig(dtype=jnp.dtype("bfloat16"), kernel="auto", remat=True, **execution)
    return Trainer(CONFIG, config, mesh)


@needs_libtpu
def test_update_on_v5e():
    mesh = topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=4))
    compiled, _ = trainer(mesh).compile_update(LAYOUT, 4)
    memory, chip = memory_of(compiled), chip_of(mesh)
    assert chip.name == "v5e" and 0 < memory.total < chip.hbm_bytes
    # The new state reuses the memory of the old one; only the metrics need more.
    assert 0.9 * memory.outputs < memory.aliased <= memory.outputs

    program = compiled.as_text()
    assert "splash" in program
    gathered = set(re.findall(r"((?:f32|bf16)\[[\d,]+\])[^=]* all-gather", program))
    hidden = f"{3 * CONFIG.width},{CONFIG.width}]"
    # Weights are cast before they travel, one layer at a time, and activations do not travel.
    assert any(shape.startswith("bf16") and shape.endswith(hidden) for shape in gathered)
    assert not any(shape.startswith("f32") and shape.endswith(hidden) for shape in gathered)
    assert not any(f"[{CONFIG.layers}," in shape for shape in gathered)
    assert not any(f"[4,{LAYOUT.length}," in shape for shape in gathered)


@needs_libtpu
@pytest.mark.parametrize(
    ("keep", "times"),
    [(dict(keep="inputs"), 2), (dict(keep="attention"), 1), (dict(keep="fit", activations_gib=1.0), 1)],
)
def test_the_result_of_attention_is_computed_again_unless_it_is_kept(keep, times):
    mesh = topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=4))
    compiled, _ = trainer(mesh, **keep).compile_update(LAYOUT, 4)
    assert len(re.findall(r"%splash_mha_fwd[\w.]* = ", compiled.as_text())) == times


CURRICULUM = pathlib.Path(__file__).parents[2] / "experiments" / "qwen_image_2" / "curriculum.py"


@needs_libtpu
@pytest.mark.parametrize(
    "part", ["vae", "s1_256p_t2i", "s2_256p_edits", "s3_512p_synthetic", "s4_1024p", "s5_2048p", "s6_fine_tuning"]
)
def test_meshes_of_the_curriculum_on_four_slices(part):
    config = load_experiment(str(CURRICULUM))
    asked = config.vae.mesh if part == "vae" else config.stages[part].transformer.mesh
    mesh = topology_mesh("v6e:16x16", asked, num_slices=4)
    assert dict(mesh.shape) == dataclasses.asdict(asked)
    slices = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert all(len(found) == 1 for found in slices)  # only `data` crosses slices
    assert set.union(*slices) == {0, 1, 2, 3}
    if part != "vae":  # weights are sharded over a whole slice
        assert mesh.shape["fsdp"] * mesh.shape["tensor"] == 256
    if mesh.shape["tensor"] > 1:  # chips that share an image are neighbours
        for together in mesh.devices.reshape(-1, mesh.shape["tensor"]):
            x, y = ({chip.coords[axis] for chip in together} for axis in (0, 1))
            assert len(x) * len(y) == len(together) and max(max(x) - min(x), max(y) - min(y)) < len(together)
    assert make_mesh(asked, list(mesh.devices.flat)) == mesh


@needs_libtpu
def test_a_mesh_that_does_not_split_over_slices_is_refused():
    with pytest.raises(ValueError, match="data=2 x fsdp=512 x tensor=1 does not split over 4 slices of 256 chips"):
        topology_mesh("v6e:16x16", sharding.MeshShape(data=2, fsdp=512), num_slices=4)


@needs_libtpu
def test_gradients_cross_slices_once_in_an_update():
    mesh = topology_mesh("v6e:2x2", sharding.MeshShape(data=2, fsdp=4), num_slices=2)
    microbatch, _ = trainer(mesh).compile_microbatch(LAYOUT, 8)
    apply, _ = trainer(mesh).compile_apply(LAYOUT, 8)

    def sent(compiled):
        sizes = dict.fromkeys(("bf16", "f32"), 0)
        for line in compiled.as_text().splitlines():
            if " send(" in line:
                assert '_xla_megascale_transfer_type="ALL_REDUCE"' in line
                for dtype, shape in re.findall(r"= \((\w+)\[([\d,]*)\]", line):
                    sizes[dtype] += math.prod(int(size) for size in shape.split(",") if size)
        return sizes

    # A microbatch sends its loss and other single numbers, the end of the update one shard of all gradients.
    model = jax.eval_shape(lambda: MMDiT(CONFIG, key=jax.random.key(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert sum(sent(microbatch).values()) < parameters / 100
    assert parameters / 4 <= sent(apply)["f32"] < 1.1 * parameters
    assert sent(apply)["bf16"] == 0
    halved, _ = trainer(mesh, replica_sum=jnp.dtype("bfloat16")).compile_apply(LAYOUT, 8)
    assert parameters / 4 <= sent(halved)["bf16"] and sent(halved)["f32"] < parameters / 100


@needs_libtpu
def test_where_chips_divide_tokens_gradients_are_scattered_and_heads_exchanged():
    mesh = topology_mesh("v6e:2x2", sharding.MeshShape(fsdp=2, tensor=2))
    assert trainer(mesh).divided(LAYOUT, 2) == "sequence"
    compiled, seconds = trainer(mesh, keep="projections", shard_sum=jnp.dtype("float32")).compile_update(LAYOUT, 2)
    moved = plan_program("", 2, mesh, compiled, seconds, lambda call, operands: 0.0).analysis.bytes_by()
    matrices = CONFIG.layers * CONFIG.width**2 * (4 + 3 * CONFIG.mlp_ratio) * 2  # bytes in bf16, in which they travel
    assert moved["all-gather", ("fsdp", "tensor")] == pytest.approx(2 * matrices * 3 / 4, rel=0.2)
    assert moved["reduce-scatter", ("fsdp", "tensor")] == pytest.approx(2 * matrices * 3 / 4, rel=0.1)
    # Each of two chips sends one half of its queries, keys, values and results, and of their gradients. Weights change
    # the dim that is sharded before they are gathered, and gradients after they are scattered.
    tokens, weights = LAYOUT.length // 2 * CONFIG.width * 2 / 2, 4 * matrices / 4 / 2
    least, most = (CONFIG.layers * times * tokens for times in (8, 12))
    assert least + weights <= moved["all-to-all", ("tensor",)] <= most + weights


@needs_libtpu
def test_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology 'v5e:3x5' is unknown"):
        topology_mesh("v5e:3x5", sharding.MeshShape(fsdp=15))


def test_chip_without_known_limits_is_refused():
    with pytest.raises(ValueError, match="no limits known for 'cpu'"):
        chip_of(sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
