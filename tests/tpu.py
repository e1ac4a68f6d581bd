"""Marks tests that compile for TPU chips, which need libtpu and no TPU."""

import importlib.util
import os

import pytest

# Where CI is set, libtpu must be there: the tests then fail instead of being skipped.
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not os.environ.get("CI"),
    reason="libtpu is not installed; pip install 'qi2[tpu]'",
)
