"""Packages that only some tests need: without them these skip, except under CI, which installs all of them."""

import importlib.util
import os

import pytest


def require_packages(*modules: str) -> None:
    """Skips the test, saying what is missing; fails if the variable CI is set."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        message = f"{missing} missing: pip install -r requirements-dev.txt"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
