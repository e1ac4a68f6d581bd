"""Selection: thresholds turn scores into the list of kept records. A cheap second step: no image is read."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.filters import CASCADE
from data_pipeline.filters.duplicates import group_equal, group_near, parse_fingerprints
from data_pipeline.funnel import Step, Tally, table
from data_pipeline.scores import read_scores


@dataclass(frozen=True)
class Thresholds:
    """What a training stage asks of its images. Broken images never pass.

    Attributes:
      min_side: pixels of the shorter side, upright.
      max_aspect: longer over shorter side.
      drop_contradictory_orientation: drop files that contradict themselves about which side is up.
      drop_exact_duplicates: keep only the first, by key, of files with the same bytes or the same pixels.
      drop_near_duplicates: keep only the first, by key, of each group of near duplicates (`filters.duplicates`).
      near_distance: largest distance of the 64-bit perceptual hashes; recompression and rescaling rarely exceed it.
      near_difference: largest difference of any thumbnail cell, in grey levels of 255.
      near_min_entropy: bits; flatter pictures are never called near duplicates.
    """

    min_side: int = 256
    max_aspect: float = 3.0
    drop_contradictory_orientation: bool = True
    drop_exact_duplicates: bool = True
    drop_near_duplicates: bool = True
    near_distance: int = 6
    near_difference: int = 12
    near_min_entropy: float = 3.0

    def __post_init__(self):
        ranges = {"min_side": (1, 1 << 20), "max_aspect": (1, 1e6)}
        ranges |= {"near_distance": (0, 64), "near_difference": (0, 255), "near_min_entropy": (0, 8)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; choose between {low} and {high}")


@dataclass(frozen=True)
class Kept:
    """A kept record: its key, its position in the `RecordFolder`, and its upright size in pixels."""

    key: str
    index: int
    width: int
    height: int


@dataclass(frozen=True)
class Dropped:
    """Why a record was dropped: the step, the reason, and for duplicates the key of the record kept in its place."""

    step: str
    reason: str
    duplicate_of: str | None = None


@dataclass(frozen=True)
class Selection:
    """The outcome: kept records in the order of the folder, dropped ones by key, and the funnel of counts."""

    thresholds: Thresholds
    kept: tuple[Kept, ...]
    dropped: dict[str, Dropped]
    steps: tuple[Step, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(record.key for record in self.kept)

    def table(self):
        """The funnel as a `rich.table.Table`."""
        return table("selection", self.steps)

    def to_dict(self) -> dict:
        """Thresholds, filter versions and funnel, for JSON; without the list of keys, which may be long."""
        return {
            "thresholds": asdict(self.thresholds),
            "filters": {filter.name: filter.version for filter in CASCADE},
            "kept": len(self.kept),
            "funnel": [step.to_dict() for step in self.steps],
        }


def select(folder: Path | str, thresholds: Thresholds = Thresholds()) -> Selection:
    """Applies thresholds to the scores of a folder.

    Every step sees only what the steps before it kept, so a broken or too small copy never stands for its group.

    Raises:
      ValueError: when scores are missing (run `cascade.score` first).
    """
    rules = {"broken": lambda row: row["broken.reason"]}
    if thresholds.drop_contradictory_orientation:
        rules["orientation"] = lambda row: row["orientation.contradiction"]
    rules["resolution"] = lambda row: _too_small_or_long(row, thresholds)
    tallies = {name: Tally() for name in [*rules, "duplicates"]}
    dropped: dict[str, Dropped] = {}
    survivors = []

    def drop(key: str, why: Dropped) -> None:
        dropped[key] = why
        tallies[why.step].add(why.reason, key)

    count = 0
    for row in read_scores(folder, CASCADE):
        failed = next(((name, reason) for name, rule in rules.items() if (reason := rule(row)) is not None), None)
        if failed:
            drop(row["key"], Dropped(*failed))
        else:
            fingerprint = {name: value for name, value in row.items() if name.startswith(("key", "duplicates."))}
            survivors.append((Kept(row["key"], count, row["resolution.width"], row["resolution.height"]), fingerprint))
        count += 1
    duplicates = _duplicates([fingerprint for _, fingerprint in survivors], thresholds)
    for key in sorted(duplicates):
        drop(key, duplicates[key])

    steps = []
    for name, tally in tallies.items():
        steps.append(Step(name, count, tally))
        count -= tally.total
    kept = tuple(record for record, _ in survivors if record.key not in duplicates)
    return Selection(thresholds, kept, dropped, tuple(steps))


def _too_small_or_long(row: dict, thresholds: Thresholds) -> str | None:
    if row["resolution.short_side"] < thresholds.min_side:
        return "too_small"
    return "too_long" if row["resolution.aspect"] > thresholds.max_aspect else None


def _duplicates(rows: list[dict], thresholds: Thresholds) -> dict[str, Dropped]:
    """Which keys to drop: for same bytes, then same pixels, then nearness among those that are left."""
    rows = sorted(rows, key=lambda row: row["key"])
    drops: dict[str, Dropped] = {}

    def keep_first(reason: str, first: list[int]) -> None:
        nonlocal rows
        for position, row in enumerate(rows):
            if first[position] != position:
                drops[row["key"]] = Dropped("duplicates", reason, rows[first[position]]["key"])
        rows = [row for position, row in enumerate(rows) if first[position] == position]

    if thresholds.drop_exact_duplicates:
        keep_first("same_bytes", group_equal([row["duplicates.bytes_sha256"] for row in rows]))
        keep_first("same_pixels", group_equal([row["duplicates.pixels_sha256"] for row in rows]))
    if thresholds.drop_near_duplicates:
        near = group_near(
            *parse_fingerprints(rows),
            np.array([row["duplicates.entropy"] for row in rows], dtype=np.float64),
            max_distance=thresholds.near_distance,
            max_difference=thresholds.near_difference,
            min_entropy=thresholds.near_min_entropy,
        )
        keep_first("near", near)
    for key, why in drops.items():  # the copy of a copy stands for the one that was kept
        while why.duplicate_of in drops:
            why = Dropped(why.step, why.reason, drops[why.duplicate_of].duplicate_of)
        drops[key] = why
    return drops
