"""Draws the reports and tables that workflows and the data pipeline hand over."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def shown_on(console: Console) -> Callable[[Any], None]:
    """A function that draws reports on a console, as `workflows.reports.Show`."""

    def show(report: Any) -> None:
        if hasattr(report, "tables"):
            for table in report.tables():
                console.print(table)
        else:
            console.print(report.table() if hasattr(report, "table") else _drawn(report))

    return show


def _drawn(report: Any) -> Table:
    """A `workflows.reports.Table` as rich draws it."""
    table = Table(title=report.title, show_header=bool(report.columns))
    for place, column in enumerate(report.columns):
        table.add_column(column, justify="right" if place else "left")
    for row in report.rows:
        table.add_row(*row)
    return table
