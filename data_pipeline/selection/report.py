"""An HTML page about a folder of scored records: what a selection keeps and drops, and why, with images."""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fontTools import unicodedata

from data_pipeline.buckets import BucketReport, Resolutions
from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.filters.base import Threshold
from data_pipeline.records.shards import RecordFolder
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection import report_page
from data_pipeline.selection.index import Selection
from data_pipeline.selection.percentiles import Cuts, Group, class_of, find_cuts
from data_pipeline.selection.thresholds import ALIGNMENTS, Thresholds
from qi2_jax.pages import render
from qi2_jax.runtime.atomic import write_atomic

MAX_VALUES = 200_000  # values in a histogram; larger folders are sampled evenly
MAX_FIGURES = 6  # thumbnails on each side of a threshold
MAX_PAIRS = 24  # pairs of near duplicates
MAX_CAPTIONS = 3  # captions shown per script
MIN_LETTERS = 2  # letters of a script for its captions to be shown; a single one is a unit or a symbol
MAX_CHARS = 600  # characters of a caption
MAX_ROWS = 40  # rows of a table of groups


@dataclass(frozen=True)
class Limit:
    """A threshold and the full name of the score column that it cuts."""

    column: str
    declared: Threshold

    @property
    def threshold(self) -> str:
        return self.declared.name


LIMITS = tuple(
    Limit(f"{filter.name}.{one.column}", one)
    for filter in CASCADE
    for one in filter.thresholds
    if one.column is not None
)


@dataclass
class _Scan:
    """The result of one pass over the scores. `values`, `near` and `groups` are keyed by the name of a threshold."""

    values: dict[str, list[float]] = field(default_factory=dict)
    near: dict[str, tuple[list, list]] = field(default_factory=dict)  # nearest on the kept side, and on the other
    groups: dict[str, dict[Group, list]] = field(default_factory=dict)  # [lowest kept score, scores, scores below]
    languages: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    tags: Counter = field(default_factory=Counter)
    pair_records: dict[str, tuple[int, bool, str]] = field(default_factory=dict)  # index, unsafe, size by key


def write_report(
    path: Path, folder: Path, selection: Selection, resolutions: Resolutions | None = None
) -> dict[str, Any]:
    """Writes the page.

    Args:
      path: HTML file.
      folder: folder of scored records.
      selection: selection of these records.
      resolutions: resolutions for a table of the kept records' buckets; None omits the table.

    Returns:
      The figures of the page's tables, for JSON: `resolutions`, `languages` and `kinds` of captions, `classes` of
      records, and `groups`: the cut of each group with a percentile.

    Raises:
      ValueError: if scores are missing.
    """
    records, thresholds = RecordFolder(folder), selection.thresholds
    by = ALIGNMENTS[thresholds.alignment_by]
    cuts = find_cuts(folder, thresholds.min_alignment_percentile, thresholds.min_aesthetic_percentile, by)
    limits = [
        replace(limit, column=f"{by.name}.cosines") if limit.threshold == "min_alignment" else limit for limit in LIMITS
    ]
    pairs = _near_pairs(selection)
    scan = _scan(folder, thresholds, limits, cuts, max(1, len(records) // MAX_VALUES), {*pairs, *pairs.values()})
    sizes = ((kept.width, kept.height) for kept in selection.kept)
    fit = None if resolutions is None else resolutions.report(sizes)
    counts = {
        "language": scan.languages,
        "kind of caption": scan.kinds,
        "class": scan.tags,
        "colour profile": Counter(selection.colours),
    }
    page = render(
        "data.html",
        title="qi2 data report",
        folder=str(folder),
        records=f"{len(records):,}",
        kept=f"{len(selection.kept):,}",
        warnings=[
            *(f"{name} was not scored: {needs}" for name, needs in selection.not_scored.items()),
            *(f"{name} {text}" for name, text in selection.trials.items()),
        ],
        funnel=report_page.funnel(selection.steps),
        pairs=_show_pairs(pairs, scan, records, selection),
        limits=[_limit(limit, scan, records, thresholds) for limit in limits if scan.values.get(limit.threshold)],
        tables=report_page.tables(counts, fit),
        captions=_captions(records, selection),
    )
    write_atomic(path, page.encode())
    return _figures(scan, selection, fit)


def _figures(scan: _Scan, selection: Selection, fit: BucketReport | None) -> dict[str, Any]:
    """The figures of the page's tables, for JSON."""
    return {
        "resolutions": None if fit is None else fit.to_dict(),
        "languages": dict(scan.languages.most_common()),
        "kinds": dict(scan.kinds.most_common()),
        "classes": dict(scan.tags.most_common()),
        "colours": selection.colours,
        "groups": {
            name: [
                {**_name_group(group), "lowest": lowest, "scores": count, "below": below}
                for group, (lowest, count, below) in _largest_first(groups)
            ]
            for name, groups in scan.groups.items()
        },
    }


def _near_pairs(selection: Selection) -> dict[str, str]:
    """An even sample of near duplicates to show, with the keys of the records kept in their place."""
    near = [(key, why.duplicate_of) for key, why in selection.dropped.items() if why.reason == "near"]
    return {key: kept for key, kept in near[:: -(-len(near) // MAX_PAIRS) or 1] if kept is not None}


def _show_pairs(pairs: dict[str, str], scan: _Scan, records: RecordFolder, selection: Selection) -> dict[str, Any]:
    def shown(title: str, key: str) -> dict[str, Any]:
        index, unsafe, size = scan.pair_records[key]
        return report_page.figure(records[index], [title, key, size], unsafe)

    total = sum(why.reason == "near" for why in selection.dropped.values())
    return {
        "text": f"{total:,} near duplicates were dropped; {len(pairs):,} of them are shown next to the record that was "
        "kept in their place. The file selection.dropped.parquet next to the selection lists all.",
        "shown": [{"kept": shown("kept", kept), "dropped": shown("dropped", key)} for key, kept in pairs.items()],
    }


def _scan(
    folder: Path, thresholds: Thresholds, limits: Sequence[Limit], cuts: Cuts, every: int, wanted: set[str]
) -> _Scan:
    scan = _Scan()
    for index, row in enumerate(read_scores(folder, (*CASCADE, *TRIALS))):
        scan.languages.update(language or "not said" for language in row["description.languages"])
        scan.kinds.update(row["description.kinds"])
        scan.tags.update(row["description.tags"])
        unsafe = (row["nsfw.score"] or 0) >= thresholds.max_nsfw
        if row["key"] in wanted:
            size = f"{row['resolution.width']} x {row['resolution.height']}"
            scan.pair_records[row["key"]] = index, unsafe, size
        for limit in limits:
            values = _values(limit, row, thresholds)
            if index % every == 0:
                scan.values.setdefault(limit.threshold, []).extend(values)
            for value, (group, cut) in zip(values, _cuts(limit, row, len(values), thresholds, cuts), strict=True):
                inside = value >= cut if limit.declared.keeps == "above" else value <= cut
                if group is not None:
                    counted = scan.groups.setdefault(limit.threshold, {}).setdefault(group, [cut, 0, 0])
                    counted[1] += 1
                    counted[2] += not inside
                heap = scan.near.setdefault(limit.threshold, ([], []))[0 if inside else 1]
                distance = abs(_scale(value, limit) - _scale(cut, limit))
                heapq.heappush(heap, (-distance, -index, value, unsafe))
                if len(heap) > MAX_FIGURES:
                    heapq.heappop(heap)
    return scan


def _values(limit: Limit, row: dict, thresholds: Thresholds) -> list[float]:
    """The scores of a record to which a threshold applies."""
    if limit.declared.applies_to not in ("all", "edits" if row["description.conditions"] else "pairs"):
        return []
    scores = row[limit.column] if limit.declared.values is None else limit.declared.values(row, thresholds)
    values = scores if isinstance(scores, list) else [scores]
    return [value for value in values if value is not None]


def _cuts(limit: Limit, row: dict, count: int, thresholds: Thresholds, cuts: Cuts) -> list[tuple[Group | None, float]]:
    """The group and the threshold of each of a record's scores; the group is None if the threshold has no groups."""
    cut = getattr(thresholds, limit.threshold)
    if not limit.declared.by_group or not _percentile(limit, thresholds):
        return [(None, cut)] * count
    name = limit.threshold.removeprefix("min_")
    classes = [class_of(row)] * count
    groups: list[Group] = [(one,) for one in classes]
    if name == "alignment":
        groups = list(zip(row["description.languages"][:count], classes, strict=True))
    return [(group, max(cut, getattr(cuts, name)[group])) for group in groups]


def _percentile(limit: Limit, thresholds: Thresholds) -> float:
    return getattr(thresholds, f"{limit.threshold}_percentile")


def _name_group(group: Group) -> dict[str, str | None]:
    return dict(zip(("language", "class")[-len(group) :], group, strict=True))


def _scale(value: float, limit: Limit) -> float:
    return math.log(max(value, 1e-6)) if limit.declared.logarithmic else value


def _limit(limit: Limit, scan: _Scan, records: RecordFolder, thresholds: Thresholds) -> dict[str, Any]:
    """The section of a threshold: its scores as a histogram, the cut of each group, and images near the threshold."""
    asked, groups = f"{limit.threshold} = {getattr(thresholds, limit.threshold):g}", scan.groups.get(limit.threshold)
    cuts = [getattr(thresholds, limit.threshold)]
    if groups:
        asked += f", {limit.threshold}_percentile = {_percentile(limit, thresholds):g}"
        cuts = [lowest for _, (lowest, *_) in _largest_first(groups)[:MAX_ROWS]]
    columns = {f"{f.name}.{name}": text for f in (*CASCADE, *TRIALS) for name, (_, text) in f.columns.items()}
    sides = [
        {"title": f"{title}, {asked}", "figures": [_scored(records, *rest) for _, *rest in sorted(heap, reverse=True)]}
        for title, heap in zip(("kept side", "other side"), scan.near[limit.threshold], strict=True)
    ]
    return {
        "column": limit.column,
        "meaning": columns[limit.column]
        + ("" if limit.declared.applies_to == "all" else f" ({limit.declared.applies_to} only)"),
        "histogram": report_page.histogram(
            [_scale(value, limit) for value in scan.values[limit.threshold]],
            [_scale(cut, limit) for cut in cuts],
            limit.declared.logarithmic,
        ),
        "groups": _groups(groups) if groups else None,
        "sides": sides,
    }


def _scored(records: RecordFolder, number: int, value: float, unsafe: bool) -> dict[str, Any]:
    record = records[-number]
    return report_page.figure(record, [f"{value:.4g}", record.key], unsafe)


def _groups(groups: dict[Group, list]) -> dict[str, Any]:
    """A table with the cut of each group."""
    rows = [
        [*(name or "none" for name in group), f"{count:,}", f"{below:,}", f"{lowest:.4g}"]
        for group, (lowest, count, below) in _largest_first(groups)[:MAX_ROWS]
    ]
    return {"head": [*_name_group(next(iter(groups))), "scores", "below", "lowest kept"], "rows": rows}


def _largest_first(groups: dict[Group, list]) -> list[tuple[Group, list]]:
    return sorted(groups.items(), key=lambda item: (-item[1][1], str(item[0])))


def _captions(records: RecordFolder, selection: Selection) -> list[tuple[str, list[str]]]:
    """Some captions for each script, from about a thousand kept records."""
    by_script: dict[str, list[str]] = {}
    for kept in selection.kept[:: max(1, len(selection.kept) // 1000)]:
        record = records[kept.index]
        for position in kept.captions:
            text = record.captions[position].text
            for script, start in scripts_of(text).items():
                texts = by_script.setdefault(script, [])
                if len(texts) < MAX_CAPTIONS:  # a quotation far inside is shown with a few words before it
                    texts.append(text[:MAX_CHARS] if start < MAX_CHARS // 2 else f"… {text[start - 80 :][:MAX_CHARS]}")
    return sorted(by_script.items())


def scripts_of(text: str) -> dict[str, int]:
    """The scripts of a text, by their Unicode names (Latin, Han, Arabic), with the position of their first letter.

    Scripts with a single letter are left out unless there is no other script. A text without letters has the script
    "none".
    """
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for position, letter in enumerate(text):
        code = unicodedata.script(letter) if letter.isalpha() else "Zyyy"
        if code not in ("Zyyy", "Zinh", "Zzzz"):  # common, inherited, unknown
            script = unicodedata.script_name(code)
            counts[script] += 1
            first.setdefault(script, position)
    least = min(MIN_LETTERS, max(counts.values(), default=0))
    return {script: first[script] for script in counts if counts[script] >= least} or {"none": 0}
