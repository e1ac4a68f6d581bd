"""Errors that users can fix."""

import os

TRACEBACK = "QI2_TRACEBACK"  # environment variable


def explain(verb: str, error: BaseException) -> str | None:
    """Returns the message for an error that users can fix, or None for an error that is shown with its traceback."""
    if os.environ.get(TRACEBACK) or not isinstance(error, (ValueError, OSError, FloatingPointError)):
        return None
    return f"qi2 {verb}: {error}"
