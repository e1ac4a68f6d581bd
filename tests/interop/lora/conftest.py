"""The same tiny model on both sides: ours and diffusers'."""

import jax
import jax.numpy as jnp
import pytest
import torch

from qi2_jax import sharding
from qi2_jax.inference.pipeline import Pipeline
from qi2_jax.interop import components
from qi2_torch.load import load_pipeline


@pytest.fixture(scope="package", autouse=True)
def few_threads():
    """PyTorch's threads spin when other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def ours(imported):
    return Pipeline.load(imported, dtype=jnp.float32, mesh=sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))


@pytest.fixture(scope="package")
def theirs(published):
    pipeline = load_pipeline(published)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="package")
def base_config(imported):
    return components.read_config(imported / "transformer", "transformer")
