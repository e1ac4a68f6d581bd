"""One HTML page about a folder of scored records: what a selection does to it, and why, with pictures.

The page holds everything inside itself and loads nothing. Names and captions are data from outside: they are escaped.
"""

import base64
import heapq
import html
import io
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFilter, ImageOps

from data_pipeline.atomic import write_atomic
from data_pipeline.buckets import Resolutions
from data_pipeline.filters import CASCADE
from data_pipeline.funnel import Step
from data_pipeline.images import UndecodableImage, decode_image, over_white
from data_pipeline.records import Record
from data_pipeline.scores import read_scores
from data_pipeline.selection import Selection
from data_pipeline.shards import RecordFolder

BINS = 40
MAX_VALUES = 200_000  # of a histogram, drawn evenly from larger folders
NEAREST = 6  # thumbnails on each side of a threshold
TEXTS = 3  # captions shown per script
THUMB = 112


@dataclass(frozen=True)
class Limit:
    """A threshold and the score column that it cuts: `keeps` says on which side records stay."""

    column: str
    threshold: str
    keeps: str  # "above" or "below"
    logarithmic: bool = False


LIMITS = (
    Limit("resolution.short_side", "min_side", "above", True),
    Limit("resolution.aspect", "max_aspect", "below", True),
    Limit("entropy.bits", "min_bits", "above"),
    Limit("entropy.edges", "min_edges", "above"),
    Limit("entropy.roughness", "max_roughness", "below"),
    Limit("caption_length.tokens", "min_tokens", "above", True),
    Limit("caption_length.tokens", "max_tokens", "below", True),
    Limit("quality.clarity", "min_clarity", "above", True),
    Limit("quality.brightness", "min_brightness", "above"),
    Limit("quality.brightness", "max_brightness", "below"),
    Limit("quality.noise", "max_noise", "below"),
    Limit("compression.jpeg_quality", "min_jpeg_quality", "above"),
    Limit("compression.bits_per_pixel", "min_bits_per_pixel", "above", True),
    Limit("border.area", "max_border", "below"),
    Limit("nsfw.score", "max_nsfw", "below"),
    Limit("alignment.cosines", "min_alignment", "above"),
    Limit("aesthetic.score", "min_aesthetic", "above"),
)


@dataclass
class _Scan:
    """What one pass over the scores collects."""

    values: dict[str, list[float]] = field(default_factory=dict)
    near: dict[str, tuple[list, list]] = field(default_factory=dict)  # by threshold: nearest kept side, nearest other
    languages: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    tags: Counter = field(default_factory=Counter)


def write_report(path: Path, folder: Path, selection: Selection, resolutions: Resolutions | None = None) -> None:
    """Writes the page.

    Args:
      path: of the HTML file.
      folder: of scored records.
      selection: of these records.
      resolutions: whose buckets the kept records would go to; None: no such table.

    Raises:
      ValueError: when scores are missing.
    """
    records = RecordFolder(folder)
    scan = _scan(folder, selection, max(1, len(records) // MAX_VALUES))
    body = [
        f"<h1>{_text(str(folder))}</h1>",
        f"<p>{len(records):,} records, {len(selection.kept):,} kept.</p>",
        *(
            f'<p class="loud">{_text(name)} was not scored: {_text(needs)}</p>'
            for name, needs in selection.not_scored.items()
        ),
        "<h2>Funnel</h2>",
        _funnel(selection.steps),
        "<h2>Scores and thresholds</h2>",
        *(_limit(limit, scan, records, selection) for limit in LIMITS if scan.values.get(limit.column)),
        "<h2>Sizes, languages, classes</h2>",
        *_tables(scan, selection, resolutions),
        "<h2>Captions</h2>",
        _captions(records, selection),
    ]
    write_atomic(path, _PAGE.replace("BODY", "\n".join(body)).encode())


def _scan(folder: Path, selection: Selection, every: int) -> _Scan:
    scan, thresholds = _Scan(), selection.thresholds
    for index, row in enumerate(read_scores(folder, CASCADE)):
        scan.languages.update(language or "not said" for language in row["description.languages"])
        scan.kinds.update(row["description.kinds"])
        scan.tags.update(row["description.tags"])
        unsafe = (row["nsfw.score"] or 0) >= thresholds.max_nsfw
        if index % every == 0:
            for column in dict.fromkeys(limit.column for limit in LIMITS):
                scan.values.setdefault(column, []).extend(_values(row[column]))
        for limit in LIMITS:
            cut = getattr(thresholds, limit.threshold)
            for value in _values(row[limit.column]):
                inside = value >= cut if limit.keeps == "above" else value <= cut
                heap = scan.near.setdefault(limit.threshold, ([], []))[0 if inside else 1]
                distance = abs(_scale(value, limit) - _scale(cut, limit))
                heapq.heappush(heap, (-distance, -index, value, unsafe))
                if len(heap) > NEAREST:
                    heapq.heappop(heap)
    return scan


def _values(value: Any) -> Iterable[float]:
    return () if value is None else value if isinstance(value, list) else (value,)


def _scale(value: float, limit: Limit) -> float:
    return math.log(max(value, 1e-6)) if limit.logarithmic else value


def _funnel(steps: Sequence[Step]) -> str:
    rows = []
    for step in steps:
        left = step.entered - step.dropped.total
        reasons = ", ".join(f"{_text(reason)} {count:,}" for reason, count in step.dropped.counts.items())
        width = 100 * left / max(1, steps[0].entered)
        bar = f'<div class="bar" style="width:{width:.1f}%"></div>'
        rows.append([_text(step.name), f"{step.entered:,}", f"{step.dropped.total:,}", reasons, f"{left:,}", bar])
    return _table(["filter", "in", "dropped", "reasons", "out", ""], rows)


def _limit(limit: Limit, scan: _Scan, records: RecordFolder, selection: Selection) -> str:
    cut = getattr(selection.thresholds, limit.threshold)
    kept, other = (sorted(heap, reverse=True) for heap in scan.near[limit.threshold])
    sides = ((f"kept side, {limit.threshold} = {cut:g}", kept), ("other side", other))
    pictures = "".join(
        f"<div><h4>{title}</h4>{''.join(_thumbnail(records[-i], *rest) for _, i, *rest in side) or 'none'}</div>"
        for title, side in sides
    )
    meaning = next(text for f in CASCADE for name, (_, text) in f.columns.items() if f"{f.name}.{name}" == limit.column)
    return (
        f"<section><h3>{limit.column} <small>{_text(meaning)}</small></h3>"
        f'{_histogram(scan.values[limit.column], cut, limit)}<div class="sides">{pictures}</div></section>'
    )


def _histogram(values: Sequence[float], cut: float, limit: Limit) -> str:
    """Counts of values as an SVG, with the threshold as a line where it lies inside."""
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
    place = width * (_scale(cut, limit) - low) / (high - low)
    line = f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height}"/>' if 0 <= place <= width else ""
    ends = [f"{math.exp(end) if limit.logarithmic else end:.4g}" for end in (low, high)]
    scale = ", logarithmic" if limit.logarithmic else ""
    return (
        f'<svg viewBox="0 0 {width} {height + 16}" width="{width}">{bars}{line}<text x="0" y="{height + 13}">{ends[0]}'
        f'</text><text x="{width}" y="{height + 13}" text-anchor="end">{ends[1]}{scale}</text></svg>'
    )


def _thumbnail(record: Record, value: float, unsafe: bool) -> str:
    """A picture with its key and score, blurred where it may be unsafe to look at; a broken one is a note."""
    try:
        image = over_white(decode_image(record.image).image)
    except UndecodableImage as error:
        return f"<figure>{_text(error.reason)}<figcaption>{_text(record.key)}</figcaption></figure>"
    small, buffer = ImageOps.contain(image, (THUMB, THUMB)), io.BytesIO()
    (small.filter(ImageFilter.GaussianBlur(12)) if unsafe else small).save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = f"{value:.4g}<br>{_text(record.key)}"
    return f'<figure><img src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _tables(scan: _Scan, selection: Selection, resolutions: Resolutions | None) -> Iterator[str]:
    if resolutions is not None:
        report = resolutions.report((kept.width, kept.height) for kept in selection.kept)
        rows = [[name, f"{count:,}"] for name, count in report.counts.items()]
        rows += [[f"left out: {_text(reason)}", f"{count:,}"] for reason, count in report.left_out.counts.items()]
        yield _table(
            [f"bucket (mean crop {report.mean_cropped:.1%}, enlarged {report.upscaled:,})", "kept records"], rows
        )
    for title, counts in (("language", scan.languages), ("kind of caption", scan.kinds), ("class", scan.tags)):
        if counts:
            rows = [[_text(str(name)), f"{count:,}"] for name, count in counts.most_common(40)]
            yield _table([title, "captions" if title != "class" else "records"], rows)


def _captions(records: RecordFolder, selection: Selection) -> str:
    """Some captions of each script, from at most a thousand kept records."""
    found: dict[str, list[str]] = {}
    for kept in selection.kept[:: max(1, len(selection.kept) // 1000)]:
        record = records[kept.index]
        for position in kept.captions:
            text = record.captions[position].text
            texts = found.setdefault(script_of(text), [])
            if len(texts) < TEXTS:
                texts.append(text)
    rows = [[_text(script), "<br>".join(_text(text[:600]) for text in found[script])] for script in sorted(found)]
    return _table(["script", "captions"], rows)


def script_of(text: str) -> str:
    """The script of most letters, as Unicode names it: LATIN, CJK, ARABIC; "none" without letters."""
    names = Counter(unicodedata.name(letter, "OTHER").split()[0] for letter in text if letter.isalpha())
    return names.most_common(1)[0][0] if names else "none"


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
figure { display: inline-block; width: 118px; margin: 0 .4em .4em 0; vertical-align: top; }
figcaption { font-size: 11px; color: #666; overflow-wrap: anywhere; }
section { border-top: 1px solid #eee; padding: .4em 0 1em; }
</style>
BODY
</html>
"""
