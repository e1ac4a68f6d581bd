"""Traces of steps, and the names in them."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from qi2_jax.models.mmdit import Conditioning, Execution, MMDiT, MMDiTConfig
from qi2_jax.sequence import Layout
from qi2_jax.training.telemetry.profiling import Profiler


def run(profiler: Profiler, steps: range) -> None:
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((64, 64))
    for number in steps:
        with profiler.step(number):
            x = step(x)


def traces(directory) -> list[str]:
    return [path.relative_to(directory).parts[1] for path in directory.rglob("*.xplane.pb")]


def test_a_window_of_the_config_is_traced(tmp_path):
    with Profiler(tmp_path, start=3, steps=2) as profiler:
        run(profiler, range(1, 3))
        assert not (tmp_path / "profile").exists()
        run(profiler, range(3, 5))
        assert traces(tmp_path) == ["3"]
        run(profiler, range(5, 7))
    assert traces(tmp_path) == ["3"]


def test_sigusr1_traces_the_next_steps_and_an_early_end_keeps_them(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with Profiler(tmp_path, steps=100) as profiler:
        run(profiler, range(7, 8))
        os.kill(os.getpid(), signal.SIGUSR1)
        run(profiler, range(8, 10))
        assert traces(tmp_path) == []
    assert traces(tmp_path) == ["8"]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_values_out_of_range_are_refused(tmp_path):
    for start, steps in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=r"profile\.start is .* profile\.steps is"):
            Profiler(tmp_path, start, steps)


@pytest.mark.parametrize("remat", [False, True])
def test_operations_of_a_training_step_carry_the_names_of_the_source(remat):
    config = MMDiTConfig(layers=2, heads=1, head_width=8, rope_dims=(4, 2, 2), latent_channels=4, text_width=6)
    layout = Layout(text=(3,), target=4)
    model = jax.eval_shape(lambda key: MMDiT(config, key=key), jax.random.key(0))

    def loss(model, target, given):
        return jnp.mean(model(layout, target, jnp.ones(2), given, Execution(remat=remat)) ** 2)

    def array(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    given = Conditioning(array((2, 3, 6)), array((2, 7, 3), jnp.int32), array((2, 7), jnp.bool))
    hlo = jax.jit(jax.grad(loss)).lower(model, array((2, 4, 4)), given).compile().as_text()
    for part in ("image_in", "text_in", "modulation", "block/attention", "block/mlp", "read_out"):
        assert f"mmdit/{part}" in hlo, part
