"""Shared by tests on what the compiler makes of programs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def all_optimizations():
    """As in production, and compiled here; elsewhere the tests do without."""
    wanted = {"jax_disable_most_optimizations": False, "jax_enable_compilation_cache": False}
    before = {name: jax.config.read(name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
