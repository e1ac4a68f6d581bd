"""The parts of a report's page that are pictures: charts, sample images, and the frame around all."""

import base64
import html
import io
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from data_pipeline.decoding.images import UndecodableImage, decode_image
from qi2_jax.pixels import over_white
from qi2_jax.reporting import panels as grouping
from qi2_jax.reporting.charts import chart
from qi2_jax.reporting.curves import Curve
from qi2_jax.training.telemetry import metrics

MAX_IMAGE_BYTES, MAX_RAW_BYTES = 1 << 28, 200_000
MAX_SIZE = 1024, 2048  # width and height at which a picture is shown; grids of edits are tall
MAX_LINKS = 400
MAX_NOTES = 1 << 22  # bytes of what stands beside a picture
_SAMPLE = re.compile(r"(.+)-(\d+)\.png")


def text(value: str) -> str:
    return html.escape(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{lines}</table>"


def panels(curves: dict[str, Curve], restarts: Sequence[float]) -> str:
    """All curves as charts in sections, over the same steps."""
    steps = [curve.span for curve in curves.values()]
    span = min((first for first, _ in steps), default=0.0), max((last for _, last in steps), default=0.0)
    parts = []
    for section, charts in grouping.sections(curves).items():
        parts.append(f'<h2>{section}</h2><div class="charts">')
        for panel in charts:
            note = f" <small>{text(panel.note)}</small>" if panel.note else ""
            parts.append(f"<figure><h3>{text(panel.title)}{note}</h3>{chart(panel.lines, span, restarts)}</figure>")
        parts.append("</div>")
    return "\n".join(parts)


def samples(folder: pathlib.Path, page: pathlib.Path) -> str:
    """The last and the first image of each name with what stands beside them, and links to all, relative to the page's
    folder."""
    by_name: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if found := _SAMPLE.fullmatch(path.name):
            by_name.setdefault(found[1], []).append((int(found[2]), path))
    parts = ["<h2>Samples</h2>"] if by_name else []
    for name, images in sorted(by_name.items()):
        images.sort()
        shown = [images[-1], images[0]] if len(images) > 1 else images
        pictures = "".join(
            f"<figure>{_picture(path)}<figcaption>step {step:,}{_notes(path, page)}</figcaption></figure>"
            for step, path in shown
        )
        links = " ".join(_link(f"{step:,}", path, page) for step, path in images[:: -(-len(images) // MAX_LINKS)])
        parts.append(f'<h3>{text(name)}</h3><div class="samples">{pictures}</div><p class="links">Steps: {links}</p>')
    return "\n".join(parts)


def _link(label: str, path: pathlib.Path, page: pathlib.Path) -> str:
    return f'<a href="{text(urllib.parse.quote(os.path.relpath(path, page)))}">{text(label)}</a>'


def _notes(path: pathlib.Path, page: pathlib.Path) -> str:
    """What the columns of a grid are, and a line per sample: its text, and a link to its picture at full size."""
    told = read_json(path.with_suffix(metrics.NOTES), MAX_NOTES)
    columns, rows = told.get("columns"), told.get("samples")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return ""
    lines = []
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {}
        said = row.get("text")
        record = f" <small>record {text(str(row['record']))}</small>" if "record" in row else ""
        whole = path.with_suffix(metrics.WHOLE) / f"{number}.png"
        link = f" {_link('full size', whole, page)}" if whole.is_file() else ""
        lines.append(f"<li>{'–' if said is None else text(str(said))}{record}{link}</li>")
    return f": {text(', '.join(map(str, columns)))}<ol>{''.join(lines)}</ol>"


def _picture(path: pathlib.Path) -> str:
    """An image as a data URL, large ones smaller and as JPEG; a note where it is broken."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return "too large to show"
        data, kind = path.read_bytes(), "png"
        image = decode_image(data).image
    except (OSError, UndecodableImage):
        return "cannot be read"
    if len(data) > MAX_RAW_BYTES:
        image, buffer, kind = over_white(image), io.BytesIO(), "jpeg"
        image.thumbnail(MAX_SIZE, Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def read_json(path: pathlib.Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= most else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def page(title: str, body: str) -> str:
    """The whole page; `body` is HTML already."""
    head, _, end = _PAGE.partition("BODY")
    return head.replace("TITLE", text(title)) + body + end


_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>TITLE – qi2 report</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1240px; margin: 1.5em auto; padding: 0 1.2em; color: #1e293b;
  background: #f8fafc; }
h1 { font-size: 1.6em; margin: .6em 0 .2em; overflow-wrap: anywhere; } h2 { font-size: 1.2em; margin: 1.4em 0 .5em; }
h3 { font-size: 1em; margin: 0 0 .3em; } small { font-weight: normal; color: #64748b; font-size: 12px; }
section + section { border-top: 3px solid #cbd5e1; margin-top: 3em; }
body > a { margin-right: 1.2em; }
.facts { color: #64748b; margin: 0 0 .8em; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 10px; }
.tiles div { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: .5em .8em; font-size: 1.15em;
  font-weight: 600; overflow-wrap: anywhere; }
.tiles small { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.charts figure { margin: 0; background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: .7em .9em; }
svg { width: 100%; display: block; } svg text { font-size: 11px; fill: #64748b; }
.grid { stroke: #eef2f6; } .axis { stroke: #94a3b8; fill: none; } .mark { stroke: #f59e0b; stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.keys { display: flex; flex-wrap: wrap; gap: .1em 1em; font-size: 12px; color: #475569; overflow-wrap: anywhere; }
.keys i { display: inline-block; width: 16px; border-top: 3px solid; margin-right: 5px; vertical-align: middle; }
.keys i.dashed { border-top-style: dashed; } .keys b { color: #1e293b; }
.samples { display: flex; flex-wrap: wrap; gap: 14px; }
.samples figure { margin: 0; flex: 1 1 420px; max-width: 605px; }
.samples img { max-width: 100%; min-width: min(100%, 256px); border-radius: 6px; } figcaption { color: #64748b; }
figcaption ol { margin: .3em 0; padding-left: 2em; font-size: 12px; overflow-wrap: anywhere; }
.links { font-size: 12px; } .links a { margin-right: .5em; }
table { border-collapse: collapse; margin: .4em 0; background: #fff; } pre { font-size: 12px; overflow-x: auto; }
td, th { padding: .25em .8em; text-align: left; border: 1px solid #e2e8f0; vertical-align: top; }
td { overflow-wrap: anywhere; } td:not(:last-child) { white-space: nowrap; }
details { margin: 1em 0; } summary { cursor: pointer; font-weight: 600; }
</style>
BODY
</html>
"""
