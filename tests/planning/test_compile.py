"""The training step of a tiny transformer, compiled for TPU chips that are not attached."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import pytest

from qi2_jax import sharding
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.planning.compile import compile_train_step, topology_mesh
from qi2_jax.runtime.chips import chip_of
from qi2_jax.sequence import Layout
from qi2_jax.tasks.devices import make_mesh
from qi2_jax.workflows.config import load_experiment

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install 'qi2[tpu]'"
)

CONFIG = MMDiTConfig(layers=3, heads=2, head_width=32, text_width=48, rope_dims=(8, 12, 12))
LAYOUT = Layout((40,), 100)


@needs_libtpu
def test_train_step_for_v5e():
    report, compiled = compile_train_step(CONFIG, LAYOUT, topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=4)))
    assert (report.chip.name, report.chips, report.images) == ("v5e", 4, 4)
    assert 0 < report.memory.total < report.chip.hbm_bytes
    # The new state reuses the memory of the old one; only the metrics need more.
    assert 0.9 * report.memory.outputs < report.memory.aliased <= report.memory.outputs
    assert f"of {report.chip.hbm_bytes / 2**30:.2f} GiB" in "\n".join(report.lines())

    program = compiled.as_text()
    assert "splash" in program
    gathered = set(re.findall(r"((?:f32|bf16)\[[\d,]+\])[^=]* all-gather", program))
    hidden = f"[{3 * CONFIG.width},{CONFIG.width}]"
    assert f"bf16{hidden}" in gathered and f"f32{hidden}" not in gathered  # weights are cast before they travel
    assert not any(f"[{CONFIG.layers}," in shape for shape in gathered)  # one layer at a time
    assert not any(f"[4,{LAYOUT.length}," in shape for shape in gathered)  # activations are not gathered


@needs_libtpu
@pytest.mark.parametrize(("keep", "times"), [("inputs", 2), ("attention", 1)])
def test_the_result_of_attention_is_computed_again_unless_it_is_kept(keep, times):
    mesh = topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=4))
    _, compiled = compile_train_step(CONFIG, LAYOUT, mesh, keep=keep)
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
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {1}, {2}, {3}]
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
def test_only_sums_of_gradients_cross_slices():
    mesh = topology_mesh("v6e:2x2", sharding.MeshShape(data=2, fsdp=4), num_slices=2)
    report, compiled = compile_train_step(CONFIG, LAYOUT, mesh)
    assert (report.chips, report.images) == (8, 8)
    program = compiled.as_text()
    sent = [line for line in program.splitlines() if " send(" in line]
    # Only sums leave a slice; weights and activations travel within it.
    assert sent and all('_xla_megascale_transfer_type="ALL_REDUCE"' in line for line in sent)
    assert all('_xla_megascale_reduce_operation="SUM"' in line for line in sent)
    groups = re.findall(
        r" (?:all-gather|all-reduce|reduce-scatter|all-to-all)\(.*?replica_groups=\{(.*?)\}[,}]", program
    )
    assert groups and all(max(map(int, re.findall(r"\d+", group))) < 4 for group in groups)
    # Gradients of the blocks' matrices are summed in the compute dtype, those of fp32 computations in fp32.
    elements = {"bf16": 0, "f32": 0}
    for dtype, shape in (found for line in sent for found in re.findall(r"= \((\w+)\[([\d,]*)\]", line)):
        elements[dtype] += math.prod(int(size) for size in shape.split(",") if size)
    assert elements["bf16"] >= 13 * CONFIG.width**2 // 4 and elements["f32"] > 0  # one chip's shard of a block


@needs_libtpu
def test_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology 'v5e:3x5' is unknown"):
        topology_mesh("v5e:3x5", sharding.MeshShape(fsdp=15))


def test_chip_without_known_limits_is_refused():
    with pytest.raises(ValueError, match="no limits known for 'cpu'"):
        chip_of(sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
