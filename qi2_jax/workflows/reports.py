"""What workflows hand to the command line, which draws it."""

from collections.abc import Callable
from typing import Any

# Receives a `data_pipeline.funnel.Table`, or a report with a method `table()` or `tables()`.
Show = Callable[[Any], None]


def ignore(report: Any) -> None:
    """A `Show` that shows nothing."""
