"""The report of `qi2 data synth text`: counts of records and of dropped texts, as tables and for JSON."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.funnel import Step, Table, Tally, table
from data_pipeline.synthesis.lettering.scripts import SCRIPTS
from data_pipeline.synthesis.rounds import shortfall


@dataclass
class TextReport:
    """The result of a run.

    Attributes:
      folder: folder of the records.
      asked: number of records that were asked for.
      made: number of records by (strategy, script).
      dropped: texts and images that could not be used, by strategy.
      given_up: number of samples without any usable text, by (strategy, script).
      refused: lines of the corpus file that could not be used.
      usable_lines: number of lines of the corpus file that could be used.
    """

    folder: str
    asked: int
    made: dict[tuple[str, str], int] = field(default_factory=dict)
    dropped: dict[str, Tally] = field(default_factory=dict)
    given_up: dict[tuple[str, str], int] = field(default_factory=dict)
    refused: Tally = field(default_factory=Tally)
    usable_lines: int = 0

    @property
    def records(self) -> int:
        return sum(self.made.values())

    @property
    def shortfall(self) -> str | None:
        """Why there are fewer records than asked for; None if there are enough."""
        return shortfall(self.records, self.asked, sum(self.dropped.values(), Tally()).counts)

    def tables(self) -> Iterator[Table]:
        """Yields a table of records per script and strategy, and then a table of dropped texts by reason."""
        strategies = list(dict.fromkeys(strategy for strategy, _ in (*self.made, *self.given_up)))
        scripts = list(dict.fromkeys(script for _, script in (*self.made, *self.given_up)))
        right = (*strategies, "given up")
        title = f"{self.records:,} of {self.asked:,} records of synthetic text in {self.folder}"
        view = Table(title, ("script", *right), right)
        for script in scripts:
            given_up = sum(self.given_up.get((strategy, script), 0) for strategy in strategies)
            counts = [f"{self.made.get((strategy, script), 0):,}" for strategy in strategies]
            view.add_row(f"{SCRIPTS[script].name} ({script})", *counts, f"{given_up:,}")
        yield view
        steps = [Step(f"texts of {strategy}", self._tried(strategy), tally) for strategy, tally in self.dropped.items()]
        if self.refused.total:
            steps.insert(0, Step("lines of the corpus", self._lines, self.refused))
        if steps:
            yield table("dropped", tuple(steps))

    @property
    def _lines(self) -> int:
        return self.usable_lines + self.refused.total

    def _tried(self, strategy: str) -> int:
        return self.dropped[strategy].total + sum(n for (name, _), n in self.made.items() if name == strategy)

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "asked": self.asked,
            "records": self.records,
            "shortfall": self.shortfall,
            "made": _nested(self.made),
            "given_up": _nested(self.given_up),
            "dropped": {strategy: tally.to_dict() for strategy, tally in self.dropped.items()},
            "corpus": {"usable": self.usable_lines, "refused": self.refused.to_dict()},
        }


def _nested(counts: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (strategy, script), count in counts.items():
        nested.setdefault(strategy, {})[script] = count
    return nested
