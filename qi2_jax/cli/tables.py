"""Draws plain tables on the terminal."""

import os

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from data_pipeline.funnel import Table

FILE_WIDTH = 200  # columns


def show(table: Table) -> None:
    """Prints a table with its title and its warning. Cells are data: no markup in them is interpreted."""
    view = RichTable(title=Text(table.title), caption=Text(table.caption) if table.caption else None)
    view.caption_style = "bold red"
    for column in table.columns:
        view.add_column(Text(column), justify="right" if column in table.right else "left", overflow="fold")
    for index, cells in enumerate(table.rows):
        view.add_row(*map(Text, cells), end_section=index in table.section_ends)
    _console().print(view)


def _console() -> Console:
    """A terminal, or text of any width: where the output goes to a file, tables are not squeezed into 80 columns."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=FILE_WIDTH)


def warn(text: str) -> None:
    """Prints a line in red."""
    Console().print(Text(text, "bold red"))
