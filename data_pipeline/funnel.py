"""Counts with reasons, as plain tables and as dicts for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 5


@dataclass
class Tally:
    """How many items were rejected for each reason, and the names of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name)

    def __add__(self, other: "Tally") -> "Tally":
        total = Tally(dict(self.counts), {reason: list(names) for reason, names in self.examples.items()})
        for reason, count in other.counts.items():
            total.counts[reason] = total.counts.get(reason, 0) + count
            total.examples[reason] = (total.examples.get(reason, []) + other.examples[reason])[:MAX_EXAMPLES]
        return total

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        return {reason: {"count": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}


def reasons(tallies: Mapping[str, Tally]) -> dict[str, dict[str, int]]:
    """The counts of several tallies by name, for messages."""
    return {name: tally.counts for name, tally in tallies.items()}


@dataclass(frozen=True)
class Step:
    """One step of a funnel.

    Attributes:
      name: name of the step.
      entered: number of items that reached it.
      dropped: items that it rejected, by reason.
    """

    name: str
    entered: int
    dropped: Tally

    def to_dict(self) -> dict[str, Any]:
        return {
            "step": self.name,
            "in": self.entered,
            "out": self.entered - self.dropped.total,
            "dropped": self.dropped.to_dict(),
        }


class Table:
    """A table of plain text cells; `qi2_jax.cli.tables` draws it on a terminal.

    Args:
      title: title above the table.
      columns: headings of the columns.
      right: headings of the columns that are aligned to the right, usually numbers.

    Attributes:
      rows: cells of each row.
      section_ends: indices of the rows that are followed by a line.
      caption: warning below the table.
    """

    def __init__(self, title: str, columns: Sequence[str], right: Sequence[str] = ()):
        self.title, self.columns, self.right = title, tuple(columns), tuple(right)
        self.rows: list[tuple[str, ...]] = []
        self.section_ends: set[int] = set()
        self.caption = ""

    def add_row(self, *cells: str, end_section: bool = False) -> None:
        if end_section:
            self.section_ends.add(len(self.rows))
        self.rows.append(cells)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for cell, width, name in zip(cells, widths, self.columns, strict=True)
            ).rstrip()
            for cells in (self.columns, *self.rows)
        ]
        return "\n".join([self.title, *lines, *([self.caption] if self.caption else [])])


def table(title: str, steps: Sequence[Step]) -> Table:
    """A table with a row per step and reason."""
    view = Table(title, ("step", "in", "dropped", "reason", "out", "examples"), right=("in", "dropped", "out"))
    for step in steps:
        reasons = list(step.dropped.counts.items()) or [("", 0)]
        for row, (reason, count) in enumerate(reasons):
            first, last = row == 0, row == len(reasons) - 1
            view.add_row(
                step.name if first else "",
                f"{step.entered:,}" if first else "",
                f"{count:,}",
                reason,
                f"{step.entered - step.dropped.total:,}" if last else "",
                ", ".join(step.dropped.examples.get(reason, [])),
                end_section=last,
            )
    return view
