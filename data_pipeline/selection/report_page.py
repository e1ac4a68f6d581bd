"""Parts of the data report, which the template `qi2_jax/pages/templates/data.html` renders."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from data_pipeline.buckets import BucketReport
from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.funnel import Step
from data_pipeline.records.schema import Record
from qi2_jax.pages import data_url
from qi2_jax.pixels import over_white

WIDTH, HEIGHT, BINS = 600, 90, 40  # width and height of a histogram in pixels, and number of its bars
THUMB = 112  # pixels of the longer side of a thumbnail
SOURCES = 3  # condition images shown before the target of an edit
ROWS = 40  # rows of a table of languages or classes
BLUR = 12  # radius that makes a thumbnail safe to look at


def funnel(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """A row for each step: its name, counts and reasons, and the percentage of all records that remain after it."""
    rows = []
    for step in steps:
        left = step.entered - step.dropped.total
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in step.dropped.counts.items())
        cells = [step.name, f"{step.entered:,}", f"{step.dropped.total:,}", reasons, f"{left:,}"]
        rows.append({"cells": cells, "share": f"{100 * left / max(1, steps[0].entered):.1f}"})
    return rows


def histogram(values: Sequence[float], cuts: Sequence[float], logarithmic: bool) -> dict[str, Any]:
    """Bars for the counts of values, and lines for the thresholds in their range.

    Args:
      values, cuts: scores and thresholds, as logarithms if `logarithmic`.
      logarithmic: whether the labels of the ends are exponentials.
    """
    low, high = float(min(values)), float(max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(values, BINS, (low, high))
    bars = [
        (f"{WIDTH * i / BINS:.1f}", f"{HEIGHT * (1 - share):.1f}", f"{WIDTH / BINS - 1:.1f}", f"{HEIGHT * share:.1f}")
        for i, share in enumerate(counts / counts.max())
    ]
    places = sorted({WIDTH * (cut - low) / (high - low) for cut in cuts})
    ends = [f"{math.exp(end) if logarithmic else end:.4g}" for end in (low, high)]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "bars": [(*bar, f"{count:,}") for bar, count in zip(bars, counts, strict=True)],
        "lines": [f"{place:.1f}" for place in places if 0 <= place <= WIDTH],
        "ends": (ends[0], ends[1] + (", logarithmic" if logarithmic else "")),
    }


def figure(record: Record, lines: Sequence[str], unsafe: bool) -> dict[str, Any]:
    """Thumbnails of a record (for an edit, sources and then the target) with lines of text; a note if it is broken.

    Args:
      record: record to show.
      lines: lines below the images.
      unsafe: whether to blur the images.
    """
    shown = (*record.conditions[:SOURCES], record.image)
    try:
        images = [_thumbnail(data, unsafe) for data in shown]
    except UndecodableImage as error:
        return {"images": [error.reason], "lines": [record.key], "width": None}
    return {"images": images, "lines": lines, "width": len(shown) * (THUMB + 6)}


def _thumbnail(data: bytes, unsafe: bool) -> str:
    image, buffer = over_white(decode_image(data).image), io.BytesIO()
    width, height = (max(1, round(side * THUMB / max(image.size))) for side in image.size)  # a line has a width, too
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    (small.filter(ImageFilter.GaussianBlur(BLUR)) if unsafe else small).save(buffer, "JPEG", quality=80)
    return data_url(buffer.getvalue(), "jpeg")


def tables(counts: Mapping[str, Counter], report: BucketReport | None) -> list[dict[str, Any]]:
    """Tables of counts, each named by its key, preceded by the buckets of the kept records."""
    tables = []
    if report is not None:
        rows = [[name, f"{count:,}"] for name, count in report.counts.items()]
        rows += [[f"left out: {reason}", f"{count:,}"] for reason, count in report.left_out.counts.items()]
        head = [f"bucket (mean crop {report.mean_cropped:.1%}, enlarged {report.upscaled:,})", "kept records"]
        tables.append({"head": head, "rows": rows})
    for title, counter in counts.items():
        if counter:
            rows = [[str(name), f"{count:,}"] for name, count in counter.most_common(ROWS)]
            tables.append(
                {"head": [title, "records" if title in ("class", "colour profile") else "captions"], "rows": rows}
            )
    return tables
