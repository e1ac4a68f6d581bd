"""Fixtures for tests with real processes: data, and a run that was never interrupted."""

import pathlib

import pytest

from tests.training import runs_of


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
    """A folder with `samples` and the `model` that made them. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("data")
    runs_of.write_model(folder / "model")
    runs_of.write_samples(folder / "samples", folder / "model")
    runs_of.finish_model(folder / "samples", folder / "model")
    return folder


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> pathlib.Path:
    """A run of one process with all its checkpoints. Tests must not write to it."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    runs_of.run(data, out, *runs_of.DRAWN)
    return out
