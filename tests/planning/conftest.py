"""Fixtures of tests that inspect compiled programs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def all_optimizations():
    """Compile as in production; other tests compile without most optimizations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
