"""Options of the compiler: by kind of chip, for every program of the process."""

import types

import jax
import jax.numpy as jnp
import pytest

from qi2_jax.runtime import compiler
from qi2_jax.runtime.chips import CHIPS


def test_every_generation_has_options_with_reasons_and_a_cpu_has_none():
    assert compiler.options_for(jax.devices()) == {}
    for kind in CHIPS:
        options = compiler.OPTIONS[kind]
        assert compiler.options_for([types.SimpleNamespace(device_kind=kind)]) == {o.name: o.value for o in options}
        assert len({option.name for option in options}) == len(options)
        assert all(len(option.reason.split()) > 2 for option in options)


def test_a_program_is_compiled_with_the_options_of_its_devices(monkeypatch):
    @compiler.jit(static_argnums=1)
    def function(x, power):
        return x**power

    assert function(jnp.float32(3), 2) == 9
    unknown = compiler.Option("no_such_option", "true", "for this test")
    monkeypatch.setattr(compiler, "OPTIONS", {jax.devices()[0].device_kind: (unknown,)})

    @compiler.jit()
    def other(x):
        return x + 1

    with pytest.raises(Exception, match="no_such_option"):
        other(jnp.float32(3))
