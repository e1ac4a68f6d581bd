"""How well the edit filters tell exact pairs from spoilt ones, on edits generated from real pictures.

    python -m tests.benchmarks.edit_pairs [--records DIR] [--count N]

Without --records: the photographs of Debian's mate-backgrounds and of the demo set, with the cut-outs of
tuxpaint-stamps-default. Prints for every way of spoiling how many were dropped, and how many for the very reason; and
how many of the exact pairs are kept.
"""

import argparse
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_pipeline.demo.dataset import write_demo_folder
from data_pipeline.filters.alignment import UNRELATED
from data_pipeline.filters.caption_length import CAPTION_LENGTH
from data_pipeline.filters.description import DESCRIPTION
from data_pipeline.filters.edit_pair import EDIT_PAIR
from data_pipeline.filters.instruction import INSTRUCTION_TEXT
from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.scoring.cascade import _decode, _score_batch
from data_pipeline.selection.rules import RULES
from data_pipeline.selection.thresholds import Thresholds
from data_pipeline.sources import Options
from data_pipeline.sources.ingest import ingest
from data_pipeline.synthesis.edits.synthesis import synthesize_edits
from tests.data_pipeline.filters.spoilt_edits import compressed, spoilt

FILTERS = (DESCRIPTION, CAPTION_LENGTH, INSTRUCTION_TEXT, EDIT_PAIR)


def columns(record: Record) -> dict:
    candidate = _decode(record)
    row = {f"{f.name}.{name}": value for f in FILTERS for name, value in _score_batch(f, [candidate])[0].items()}
    return row | {UNRELATED: [False] * len(record.captions)}


def verdict(row: dict, thresholds: Thresholds) -> str | None:
    """The reason for which the rules of captions and edits drop a record."""
    return RULES["captions"](row, thresholds) or RULES["edit"](row, thresholds)


def photographs(root: Path) -> Path:
    images = root / "images"
    write_demo_folder(root / "demo")
    shutil.copytree(root / "demo/clean", images)
    for path in sorted(Path("/usr/share/backgrounds/mate/nature").glob("*.jpg")):
        shutil.copy(path, images)
    for path in images.iterdir():
        path.with_suffix(".txt").write_text(f"A picture called {path.stem}.")
    ingest(images, root / "records", Options(source="photographs"), progress=False)
    return root / "records"


class Figures:
    """Counts of verdicts, and the values of the columns by kind."""

    def __init__(self) -> None:
        self.scored = 0
        self.exact: dict[str, Counter] = {}
        self.bad: dict[tuple[str, str], Counter] = {}
        self.values: dict[tuple[str, str], list[float]] = {}

    def note(self, name: str, row: dict) -> None:
        for column in EDIT_PAIR.columns:
            value = row[f"edit_pair.{column}"]
            if isinstance(value, float | int):
                self.values.setdefault((name, column), []).append(float(value))

    def add_exact(self, record: Record, thresholds: Thresholds) -> None:
        """Scores a pair as it is and, unless it may undo just this, as JPEG."""
        row = columns(record)
        self.scored += 2
        self.exact.setdefault(record.key.split("/")[0], Counter())[verdict(row, thresholds) or "kept"] += 1
        if "edit/restoration" not in record.tags:
            again = columns(compressed(record))
            self.exact.setdefault("all, as JPEG 90", Counter())[verdict(again, thresholds) or "kept"] += 1
            self.note("all, as JPEG 90", again)
        self.note(record.tags[1], row)

    def add_spoilt(self, record: Record, other: Record, rng: np.random.Generator, thresholds: Thresholds) -> None:
        """Scores everything that is wrong with a pair on purpose."""
        for what, reason, wrong in spoilt(record, other, rng):
            row = columns(wrong)
            self.scored += 1
            found = verdict(row, thresholds)
            self.note(what, row)
            counter = self.bad.setdefault((what, reason), Counter())
            counter["all"] += 1
            counter["dropped"] += found is not None
            counter["exactly"] += found == reason
            if found != reason:
                counter[f"{found} ({record.tags[1]})"] += 1

    def print(self, console: Console, rate: float, values: bool) -> None:
        table = Table("spoilt", "reason", "pairs", "dropped", "for it", "otherwise", title="spoilt pairs")
        for (what, reason), c in self.bad.items():
            rest = {name: n for name, n in c.items() if name not in ("all", "dropped", "exactly")}
            shares = f"{c['dropped'] / c['all']:.1%}", f"{c['exactly'] / c['all']:.1%}"
            table.add_row(what, reason, str(c["all"]), *shares, ", ".join(f"{name} {n}" for name, n in rest.items()))
        console.print(table)
        table = Table("kind", "pairs", "kept", "dropped", title="exact pairs")
        for kind, c in self.exact.items():
            rest = ", ".join(f"{name} {n}" for name, n in c.items() if name != "kept")
            table.add_row(kind, str(c.total()), f"{c['kept'] / c.total():.1%}", rest)
        console.print(table)
        total, kept = (sum(map(count, self.exact.values())) for count in (Counter.total, lambda c: c["kept"]))
        caught, every = (sum(c[name] for c in self.bad.values()) for name in ("dropped", "all"))
        recall, precision = caught / every, caught / (caught + total - kept)
        console.print(
            f"spoilt pairs: recall {recall:.4f}, precision {precision:.4f}; scored {rate:.1f} pairs/s, decoding too"
        )
        if values:
            table = Table("of", "column", "min", "p5", "median", "p95", "max")
            for (name, column), found in sorted(self.values.items()):
                table.add_row(name, column, *(f"{v:.4g}" for v in np.percentile(found, (0, 5, 50, 95, 100))))
            console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--cutouts", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--max-side", type=int, default=768)
    parser.add_argument("--values", action="store_true", help="also print the range of every column by kind")
    arguments = parser.parse_args()
    console, rng = Console(width=150), np.random.default_rng(0)
    thresholds = Thresholds()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = arguments.records or photographs(Path(scratch))
        start, options = time.perf_counter(), {"count": arguments.count, "max_side": arguments.max_side}
        report = synthesize_edits(pictures, Path(scratch, "edits"), cutouts=arguments.cutouts, **options)
        console.print(report.table())
        console.print(f"{(time.perf_counter() - start) / arguments.count:.2f} s per edit\n")
        edits = list(RecordFolder(Path(scratch, "edits")))

    start, figures = time.perf_counter(), Figures()
    for number, record in enumerate(edits):
        figures.add_exact(record, thresholds)
        scene = record.key.split(": ")[1].split(" + ")[0]
        later = (edits[(number + step) % len(edits)] for step in range(1, len(edits)))
        other = next(edit for edit in later if scene not in edit.key)
        figures.add_spoilt(record, other, rng, thresholds)
    figures.print(console, figures.scored / (time.perf_counter() - start), arguments.values)


if __name__ == "__main__":
    main()
