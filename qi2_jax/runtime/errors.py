"""Errors that users can mend."""

import os

TRACEBACK = "QI2_TRACEBACK"


def explain(verb: str, error: BaseException) -> str | None:
    """What a user is told of an error that users can mend; None for others, which are shown with their traceback."""
    if os.environ.get(TRACEBACK) or not isinstance(error, (ValueError, OSError, FloatingPointError)):
        return None
    return f"qi2 {verb}: {error}"
