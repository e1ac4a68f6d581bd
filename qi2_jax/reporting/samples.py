"""Sample images of a run, with the texts that belong to them, for the run's page."""

import io
import os
import pathlib
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.decoding.images import UndecodableImage, decode_image
from qi2_jax.pages import Link, data_url
from qi2_jax.pixels import over_white
from qi2_jax.reporting.run_files import read_json
from qi2_jax.training.telemetry import metrics

MAX_IMAGE_BYTES = 1 << 28  # larger files are not opened
MAX_EMBEDDED_BYTES = 200_000  # larger files are reduced, and embedded as JPEG
MAX_SIZE = 1024, 2048  # width and height of a reduced image; grids of edits are tall
MAX_LINKS = 400  # per series
MAX_NOTES_BYTES = 1 << 22
_NAME = re.compile(r"(.+)-(\d+)\.png")


@dataclass(frozen=True)
class Notes:
    """Texts of a grid: its columns, and for each sample `text`, `record` and a link `whole` to the full size."""

    columns: str
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """An image on the page: a data URL, or a note in its place."""

    step: str
    image: str
    notes: Notes | None


@dataclass(frozen=True)
class Series:
    """All images of one name: the last and the first are shown, the others linked."""

    name: str
    shown: list[Shown]
    links: list[Link]


def find_samples(folder: pathlib.Path, page_folder: pathlib.Path) -> list[Series]:
    """The series of images in a folder, by name.

    Args:
      folder: folder with images `NAME-STEP.png`.
      page_folder: folder of the page, to which links are relative.
    """
    by_name: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if found := _NAME.fullmatch(path.name):
            by_name.setdefault(found[1], []).append((int(found[2]), path))
    result = []
    for name, images in sorted(by_name.items()):
        images.sort()
        ends = [images[-1], images[0]] if len(images) > 1 else images
        shown = [Shown(f"{step:,}", _embedded(path), _notes(path, page_folder)) for step, path in ends]
        linked = images[:: -(-len(images) // MAX_LINKS)]
        result.append(Series(name, shown, [_link(f"{step:,}", path, page_folder) for step, path in linked]))
    return result


def _link(label: str, path: pathlib.Path, page_folder: pathlib.Path) -> Link:
    return Link(label, urllib.parse.quote(os.path.relpath(path, page_folder)))


def _notes(path: pathlib.Path, page_folder: pathlib.Path) -> Notes | None:
    """The content of the JSON file beside a grid; None if there is none."""
    recorded = read_json(path.with_suffix(metrics.NOTES), MAX_NOTES_BYTES)
    columns, rows = recorded.get("columns"), recorded.get("samples")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return None
    samples = []
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {}
        text, record = row.get("text"), row.get("record")
        whole = path.with_suffix(metrics.WHOLE) / f"{number}.png"
        samples.append(
            {
                "text": "–" if text is None else str(text),
                "record": None if record is None else str(record),
                "whole": _link("full size", whole, page_folder) if whole.is_file() else None,
            }
        )
    return Notes(", ".join(map(str, columns)), samples)


def _embedded(path: pathlib.Path) -> str:
    """An image as a data URL, reduced if its file is large; a note if it is broken."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return "too large to show"
        data, kind = path.read_bytes(), "png"
        image = decode_image(data).image
    except (OSError, UndecodableImage):
        return "cannot be read"
    if len(data) > MAX_EMBEDDED_BYTES:
        image, buffer, kind = over_white(image), io.BytesIO(), "jpeg"
        image.thumbnail(MAX_SIZE, Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
    return data_url(data, kind)
