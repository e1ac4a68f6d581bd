"""Shared by tests on what the compiler makes of programs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def all_optimizations():
    """As in production; elsewhere the tests do without."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
