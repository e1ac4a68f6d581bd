"""Tables that workflows hand to the command line, which draws them."""

import dataclasses
from collections.abc import Callable
from typing import Any

# Receives a `Table`, or a report of the data pipeline.
Show = Callable[[Any], None]


def ignore(report: Any) -> None:
    """A `Show` that shows nothing."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the first column is aligned to the left, the others to the right.

    Attributes:
      title: text above the table.
      columns: heads of the columns; empty: no heads, and all columns aligned to the left.
      rows: texts of each row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
