"""Draws plain tables on the terminal."""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from data_pipeline.funnel import Table


def show(table: Table) -> None:
    """Prints a table with its title and its warning. Cells are data: no markup in them is interpreted."""
    view = RichTable(title=Text(table.title), caption=Text(table.caption) if table.caption else None)
    view.caption_style = "bold red"
    for column in table.columns:
        view.add_column(Text(column), justify="right" if column in table.right else "left", overflow="fold")
    for index, cells in enumerate(table.rows):
        view.add_row(*map(Text, cells), end_section=index in table.section_ends)
    Console().print(view)


def warn(text: str) -> None:
    """Prints a line in red."""
    Console().print(Text(text, "bold red"))
