"""Shared by all tests: eight CPU devices, and one tiny published pipeline."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Devices that share two busy cores may wait long for each other.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
).strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def configuration_of_jax_stays():
    """What a test changes in JAX's configuration, those after it would compute with."""
    before = dict(jax.config.values)
    yield
    assert dict(jax.config.values) == before


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A published pipeline folder in fp32, in single files. Not to be written to."""
    from . import tiny_pipeline

    return tiny_pipeline.write(tmp_path_factory.mktemp("published") / "pipeline")


@pytest.fixture(scope="session")
def imported(published, tmp_path_factory):
    """The same pipeline as a model folder. Not to be written to."""
    from qi2_jax.interop import folder

    out = tmp_path_factory.mktemp("imported") / "model"
    folder.import_folder(published, out)
    return out
