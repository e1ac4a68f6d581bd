"""Shared by all tests: eight CPU devices, and one tiny published pipeline."""

import os
import pathlib
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs are run a few times on tiny shapes: compiling them is most of the work. What one process has compiled, others
# read: workers and processes that tests start get these variables, too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="qi2-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
# Devices that share two busy cores may wait long for each other.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
).strip()

import jax
import jaxtyping
import pytest

from tests.array_checks import check

jaxtyping.install_import_hook(["qi2_jax", "data_pipeline"], f"{check.__module__}.{check.__name__}")
jax.config.update("jax_num_cpu_devices", 8)


LONG = ("training", "workflows", "test_readme.py")  # folders and files whose tests start many processes


def pytest_collection_modifyitems(items):
    """Runs the longest files first, so no worker is left with a long file while the others idle."""
    here = pathlib.Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] not in LONG)


@pytest.fixture(autouse=True)
def configuration_of_jax_stays():
    """Fails a test that leaves JAX's configuration changed, since later tests would inherit it."""
    before = dict(jax.config.values)
    yield
    assert dict(jax.config.values) == before


@pytest.fixture(autouse=True)
def signals_reach_processes_that_tests_start():
    """Processes inherit ignored signals: from a suite in the background, or from a test that ended a program here."""
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A published pipeline folder in fp32, in single files. Not to be written to."""
    from tests import tiny_pipeline

    return tiny_pipeline.write(tmp_path_factory.mktemp("published") / "pipeline")


@pytest.fixture(scope="session")
def imported(published, tmp_path_factory):
    """The same pipeline as a model folder. Not to be written to."""
    from qi2_jax.interop import folder

    out = tmp_path_factory.mktemp("imported") / "model"
    folder.import_folder(published, out)
    return out
