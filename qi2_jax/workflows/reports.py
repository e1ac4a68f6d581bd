"""Tables of workflows: the command line passes in a function that draws them."""

from collections.abc import Callable

from data_pipeline.funnel import Table

Show = Callable[[Table], None]


def ignore(table: Table) -> None:
    """A `Show` that shows nothing."""
