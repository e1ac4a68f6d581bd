"""The training step of a tiny transformer, compiled for TPU chips that are not there."""

import importlib.util
import re

import jax
import pytest

from qi2_jax import sharding
from qi2_jax.models.mmdit import MMDiTConfig
from qi2_jax.planning.chips import chip_of
from qi2_jax.planning.compile import compile_train_step, topology_mesh
from qi2_jax.sequence import Layout

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install 'qi2[tpu]'"
)

CONFIG = MMDiTConfig(layers=3, heads=2, head_width=32, text_width=48, rope_dims=(8, 12, 12))


@needs_libtpu
def test_train_step_for_v5e():
    mesh = topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=2, tensor=2))
    report, compiled = compile_train_step(CONFIG, Layout((40,), 100), mesh)
    assert (report.chip.name, report.chips, report.images) == ("v5e", 4, 2)
    assert 0 < report.memory.total < report.chip.hbm_bytes
    # The new state takes the place of the old one: only the metrics are new.
    assert 0.9 * report.memory.outputs < report.memory.aliased <= report.memory.outputs
    program = compiled.as_text()
    assert "splash" in program
    # Weights are gathered layer by layer: an array of all three layers would be gathered before the loop.
    gathered = re.findall(r"(?:f32|bf16)\[([\d,]+)\][^=]* all-gather", program)
    assert gathered and not any(shape.startswith("3,") for shape in gathered)
    assert "HBM per chip" in "\n".join(report.lines())


@needs_libtpu
def test_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology 'v5e:3x5' is unknown"):
        topology_mesh("v5e:3x5", sharding.MeshShape(fsdp=15))


def test_chip_without_known_limits_is_refused():
    with pytest.raises(ValueError, match="limits of 'cpu' are unknown"):
        chip_of(sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
