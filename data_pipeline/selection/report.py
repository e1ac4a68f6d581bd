"""One HTML page about a folder of scored records: what a selection does to it, and why, with pictures.

The page holds everything inside itself and loads nothing. Names and captions are data from outside: they are escaped.
"""

import base64
import heapq
import html
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from fontTools import unicodedata
from PIL import Image, ImageFilter

from data_pipeline.buckets import BucketReport, Resolutions
from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.filters import CASCADE, TRIALS
from data_pipeline.filters.base import Threshold
from data_pipeline.funnel import Step
from data_pipeline.records.schema import Record
from data_pipeline.records.shards import RecordFolder
from data_pipeline.scoring.score_tables import read_scores
from data_pipeline.selection.index import Selection
from data_pipeline.selection.percentiles import Cuts, Group, class_of, find_cuts
from data_pipeline.selection.thresholds import ALIGNMENTS, Thresholds
from qi2_jax.pixels import over_white
from qi2_jax.runtime.atomic import write_atomic

BINS = 40
MAX_VALUES = 200_000  # of a histogram, drawn evenly from larger folders
NEAREST = 6  # thumbnails on each side of a threshold
TEXTS = 3  # captions shown per script
LETTERS = 2  # of a script, for which a caption is shown; one alone is a unit or a symbol
SHOWN = 600  # characters of a caption
ROWS = 40  # of a table of languages or classes
THUMB = 112
SOURCES = 3  # of an edit, shown before its target


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
    """What one pass over the scores collects; `values`, `near` and `groups` by the name of a threshold."""

    values: dict[str, list[float]] = field(default_factory=dict)
    near: dict[str, tuple[list, list]] = field(default_factory=dict)  # nearest kept side, nearest other
    groups: dict[str, dict[Group, list]] = field(default_factory=dict)  # [lowest that stays, scores, scores below]
    languages: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    tags: Counter = field(default_factory=Counter)


def write_report(
    path: Path, folder: Path, selection: Selection, resolutions: Resolutions | None = None
) -> dict[str, Any]:
    """Writes the page.

    Args:
      path: of the HTML file.
      folder: of scored records.
      selection: of these records.
      resolutions: whose buckets the kept records would go to; None: no such table.

    Returns:
      The figures of the page's tables beside those of the selection, for JSON: `resolutions`, `languages` and `kinds`
      of captions, `classes` of records, and `groups`, the cut that a percentile makes in each.

    Raises:
      ValueError: when scores are missing.
    """
    records, thresholds = RecordFolder(folder), selection.thresholds
    by = ALIGNMENTS[thresholds.alignment_by]
    cuts = find_cuts(folder, thresholds.min_alignment_percentile, thresholds.min_aesthetic_percentile, by)
    limits = [
        replace(limit, column=f"{by.name}.cosines") if limit.threshold == "min_alignment" else limit for limit in LIMITS
    ]
    scan = _scan(folder, thresholds, limits, cuts, max(1, len(records) // MAX_VALUES))
    sizes = ((kept.width, kept.height) for kept in selection.kept)
    fit = None if resolutions is None else resolutions.report(sizes)
    body = [
        f"<h1>{_text(str(folder))}</h1>",
        f"<p>{len(records):,} records, {len(selection.kept):,} kept.</p>",
        *(
            f'<p class="loud">{_text(name)} was not scored: {_text(needs)}</p>'
            for name, needs in selection.not_scored.items()
        ),
        *(f'<p class="loud">{_text(f"{name} {text}")}</p>' for name, text in selection.trials.items()),
        "<h2>Funnel</h2>",
        _funnel(selection.steps),
        "<h2>Scores and thresholds</h2>",
        *(_limit(limit, scan, records, thresholds) for limit in limits if scan.values.get(limit.threshold)),
        "<h2>Sizes, languages, classes</h2>",
        *_tables(scan, fit, Counter(selection.colours)),
        "<h2>Captions</h2>",
        _captions(records, selection),
    ]
    write_atomic(path, _PAGE.replace("BODY", "\n".join(body)).encode())
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


def _scan(folder: Path, thresholds: Thresholds, limits: Sequence[Limit], cuts: Cuts, every: int) -> _Scan:
    scan = _Scan()
    for index, row in enumerate(read_scores(folder, (*CASCADE, *TRIALS))):
        scan.languages.update(language or "not said" for language in row["description.languages"])
        scan.kinds.update(row["description.kinds"])
        scan.tags.update(row["description.tags"])
        unsafe = (row["nsfw.score"] or 0) >= thresholds.max_nsfw
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
                if len(heap) > NEAREST:
                    heapq.heappop(heap)
    return scan


def _values(limit: Limit, row: dict, thresholds: Thresholds) -> list[float]:
    """The scores of a record that a threshold is asked about."""
    if limit.declared.applies_to not in ("all", "edits" if row["description.conditions"] else "pairs"):
        return []
    found = row[limit.column] if limit.declared.values is None else limit.declared.values(row, thresholds)
    values = found if isinstance(found, list) else [found]
    return [value for value in values if value is not None]


def _cuts(limit: Limit, row: dict, count: int, thresholds: Thresholds, cuts: Cuts) -> list[tuple[Group | None, float]]:
    """Where a threshold lies for each of a record's scores, and the group for which it does; None: for all records."""
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


def _funnel(steps: Sequence[Step]) -> str:
    rows = []
    for step in steps:
        left = step.entered - step.dropped.total
        reasons = ", ".join(f"{_text(reason)} {count:,}" for reason, count in step.dropped.counts.items())
        width = 100 * left / max(1, steps[0].entered)
        bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
        rows.append([_text(step.name), f"{step.entered:,}", f"{step.dropped.total:,}", reasons, f"{left:,}", bar])
    return _table(["filter", "in", "dropped", "reasons", "out", ""], rows)


def _limit(limit: Limit, scan: _Scan, records: RecordFolder, thresholds: Thresholds) -> str:
    asked, groups = f"{limit.threshold} = {getattr(thresholds, limit.threshold):g}", scan.groups.get(limit.threshold)
    cuts = [getattr(thresholds, limit.threshold)]
    if groups:
        asked += f", {limit.threshold}_percentile = {_percentile(limit, thresholds):g}"
        cuts = [lowest for _, (lowest, *_) in _largest_first(groups)[:ROWS]]
    kept, other = (sorted(heap, reverse=True) for heap in scan.near[limit.threshold])
    pictures = "".join(
        f"<div><h4>{title}</h4>{''.join(_thumbnail(records[-i], *rest) for _, i, *rest in side) or 'none'}</div>"
        for title, side in ((f"kept side, {asked}", kept), ("other side", other))
    )
    columns = {f"{f.name}.{name}": text for f in (*CASCADE, *TRIALS) for name, (_, text) in f.columns.items()}
    of = "" if limit.declared.applies_to == "all" else f" (of {limit.declared.applies_to} alone)"
    return (
        f"<section><h3>{limit.column} <small>{_text(columns[limit.column])}{of}</small></h3>"
        f"{_histogram(scan.values[limit.threshold], cuts, limit)}{_groups(groups or {})}"
        f'<div class="sides">{pictures}</div></section>'
    )


def _groups(groups: dict[Group, list]) -> str:
    """The cut of each group, a row each; nothing without groups."""
    if not groups:
        return ""
    rows = [
        [*(_text(name or "none") for name in group), f"{count:,}", f"{below:,}", f"{lowest:.4g}"]
        for group, (lowest, count, below) in _largest_first(groups)[:ROWS]
    ]
    return _table([*_name_group(next(iter(groups))), "scores", "below", "lowest that stays"], rows)


def _largest_first(groups: dict[Group, list]) -> list[tuple[Group, list]]:
    return sorted(groups.items(), key=lambda item: (-item[1][1], str(item[0])))


def _histogram(values: Sequence[float], cuts: Iterable[float], limit: Limit) -> str:
    """Counts of values as an SVG, with thresholds as lines where they lie inside."""
    scaled = np.array([_scale(value, limit) for value in values])
    low, high = float(scaled.min()), float(scaled.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(scaled, BINS, (low, high))
    width, height = 600, 90
    bars = "".join(
        f'<rect x="{width * i / BINS:.1f}" y="{height * (1 - share):.1f}" width="{width / BINS - 1:.1f}" '
        f'height="{height * share:.1f}"><title>{count:,}</title></rect>'
        for i, (count, share) in enumerate(zip(counts, counts / counts.max(), strict=True))
    )
    places = sorted({width * (_scale(cut, limit) - low) / (high - low) for cut in cuts})
    lines = "".join(
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height}"/>' for place in places if 0 <= place <= width
    )
    ends = [f"{math.exp(end) if limit.declared.logarithmic else end:.4g}" for end in (low, high)]
    scale = ", logarithmic" if limit.declared.logarithmic else ""
    return (
        f'<svg viewBox="0 0 {width} {height + 16}" width="{width}">{bars}{lines}<text x="0" y="{height + 13}">{ends[0]}'
        f'</text><text x="{width}" y="{height + 13}" text-anchor="end">{ends[1]}{scale}</text></svg>'
    )


def _thumbnail(record: Record, value: float, unsafe: bool) -> str:
    """A picture with its key and score, an edit with its sources before it; blurred where it may be unsafe to look at.

    A broken picture is a note.
    """
    shown = (*record.conditions[:SOURCES], record.image)
    try:
        pictures = "".join(_picture(data, unsafe) for data in shown)
    except UndecodableImage as error:
        return f"<figure>{_text(error.reason)}<figcaption>{_text(record.key)}</figcaption></figure>"
    caption = f"{value:.4g}<br>{_text(record.key)}"
    return f'<figure style="width:{len(shown) * (THUMB + 6)}px">{pictures}<figcaption>{caption}</figcaption></figure>'


def _picture(data: bytes, unsafe: bool) -> str:
    image, buffer = over_white(decode_image(data).image), io.BytesIO()
    width, height = (max(1, round(side * THUMB / max(image.size))) for side in image.size)  # of a line, too
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    (small.filter(ImageFilter.GaussianBlur(12)) if unsafe else small).save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _tables(scan: _Scan, report: BucketReport | None, colours: Counter[str]) -> Iterator[str]:
    if report is not None:
        rows = [[name, f"{count:,}"] for name, count in report.counts.items()]
        rows += [[f"left out: {_text(reason)}", f"{count:,}"] for reason, count in report.left_out.counts.items()]
        yield _table(
            [f"bucket (mean crop {report.mean_cropped:.1%}, enlarged {report.upscaled:,})", "kept records"], rows
        )
    for title, counts in (
        ("language", scan.languages),
        ("kind of caption", scan.kinds),
        ("class", scan.tags),
        ("colour profile", colours),
    ):
        if counts:
            rows = [[_text(str(name)), f"{count:,}"] for name, count in counts.most_common(ROWS)]
            yield _table([title, "records" if title in ("class", "colour profile") else "captions"], rows)


def _captions(records: RecordFolder, selection: Selection) -> str:
    """Some captions of each script that they hold, from at most a thousand kept records."""
    found: dict[str, list[str]] = {}
    for kept in selection.kept[:: max(1, len(selection.kept) // 1000)]:
        record = records[kept.index]
        for position in kept.captions:
            text = record.captions[position].text
            for script, start in scripts_of(text).items():
                texts = found.setdefault(script, [])
                if len(texts) < TEXTS:  # a quotation far inside is shown with a few words before it
                    texts.append(text[:SHOWN] if start < SHOWN // 2 else f"… {text[start - 80 :][:SHOWN]}")
    rows = [[_text(script), "<br>".join(map(_text, found[script]))] for script in sorted(found)]
    return _table(["script", "captions"], rows)


def scripts_of(text: str) -> dict[str, int]:
    """Where the first letter is of each script of a text, as Unicode names it: Latin, Han, Arabic.

    Scripts of a single letter are left out unless they are all that there is; a text without letters is of "none".
    """
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for position, letter in enumerate(text):
        code = unicodedata.script(letter) if letter.isalpha() else "Zyyy"
        if code not in ("Zyyy", "Zinh", "Zzzz"):  # common, inherited, unknown
            script = unicodedata.script_name(code)
            counts[script] += 1
            first.setdefault(script, position)
    least = min(LETTERS, max(counts.values(), default=0))
    return {script: first[script] for script in counts if counts[script] >= least} or {"none": 0}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{lines}</table>"


def _text(text: str) -> str:
    return html.escape(text)


_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>qi2 data report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: .5em 2em .5em 0; display: inline-table; vertical-align: top; }
td, th { padding: .2em .7em; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
h3 small { font-weight: normal; color: #666; } h4 { margin: .3em 0; font-weight: normal; color: #666; }
.bar { background: #4a7; height: .9em; min-width: 1px; } td:last-child { min-width: 8em; }
.loud { color: #b00; font-weight: bold; }
svg rect { fill: #79a; } svg line { stroke: #c30; stroke-width: 2; } svg text { font-size: 11px; fill: #666; }
.sides { display: flex; gap: 2em; flex-wrap: wrap; }
figure { display: inline-block; margin: 0 .4em .4em 0; vertical-align: top; }
figure img { margin-right: 4px; }
figcaption { font-size: 11px; color: #666; overflow-wrap: anywhere; }
section { border-top: 1px solid #eee; padding: .4em 0 1em; }
</style>
BODY
</html>
"""
