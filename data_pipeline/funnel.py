"""Counts with reasons, as a table for the terminal and as a dict for JSON."""

from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass
class Tally:
    """How many were refused for which reason, and the first few of each."""

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

    def to_dict(self) -> dict:
        return {reason: {"count": n, "examples": self.examples[reason]} for reason, n in self.counts.items()}


@dataclass(frozen=True)
class Step:
    """One step of a funnel: `entered` came in, `dropped` left for the counted reasons."""

    name: str
    entered: int
    dropped: Tally

    def to_dict(self) -> dict:
        return {"step": self.name, "in": self.entered, "out": self.entered - self.dropped.total} | {
            "dropped": self.dropped.to_dict()
        }


def table(title: str, steps: tuple[Step, ...]):
    """A `rich.table.Table` with a row per step and reason: in, dropped, why, out, examples."""
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(title))
    for column in ("step", "in", "dropped", "reason", "out", "examples"):
        view.add_column(column, justify="right" if column in ("in", "dropped", "out") else "left", overflow="fold")
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
                Text(", ".join(step.dropped.examples.get(reason, []))),  # names are data, not markup
                end_section=last,
            )
    return view
