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
LAYOUT = Layout((40,), 100)


@needs_libtpu
def test_train_step_for_v5e():
    report, compiled = compile_train_step(CONFIG, LAYOUT, topology_mesh("v5e:2x2", sharding.MeshShape(fsdp=4)))
    assert (report.chip.name, report.chips, report.images) == ("v5e", 4, 4)
    assert 0 < report.memory.total < report.chip.hbm_bytes
    # The new state takes the place of the old one: only the metrics are new.
    assert 0.9 * report.memory.outputs < report.memory.aliased <= report.memory.outputs
    assert f"of {report.chip.hbm_bytes / 2**30:.2f} GiB" in "\n".join(report.lines())

    program = compiled.as_text()
    assert "splash" in program
    gathered = set(re.findall(r"((?:f32|bf16)\[[\d,]+\])[^=]* all-gather", program))
    hidden = f"[{3 * CONFIG.width},{CONFIG.width}]"
    assert f"bf16{hidden}" in gathered and f"f32{hidden}" not in gathered  # weights are cast before they travel
    assert not any(f"[{CONFIG.layers}," in shape for shape in gathered)  # one layer at a time
    assert not any(f"[4,{LAYOUT.length}," in shape for shape in gathered)  # activations stay with their samples


@needs_libtpu
def test_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology 'v5e:3x5' is unknown"):
        topology_mesh("v5e:3x5", sharding.MeshShape(fsdp=15))


def test_chip_without_known_limits_is_refused():
    with pytest.raises(ValueError, match="limits of 'cpu' are unknown"):
        chip_of(sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
