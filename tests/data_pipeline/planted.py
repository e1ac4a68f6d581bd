"""Images for measuring filters: near duplicates of photographs, rendered pages, noise and flat images."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.watermark import WATERMARK
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring.cascade import score
from data_pipeline.selection.index import Selection
from data_pipeline.selection.select import select
from data_pipeline.selection.thresholds import Thresholds
from tests.data_pipeline.real_images import COPIES, bytes_of, watermark

CHEAP = tuple(filter for filter in CASCADE if filter.name != "nsfw")
WORDS = (
    *("harbour", "quarterly", "revenue", "the", "of", "a", "and", "theorem", "grew", "by", "12.5%", "in", "2025"),
    *("figure", "shows", "coffee", "is", "brewed", "slowly", "Agenda", "Summary", "question", "answer", "total"),
)


def select_files(files: Iterable[tuple[str, bytes]], thresholds: Thresholds) -> Selection:
    """Writes files as records with a caption, scores them without NSFW, and selects them."""
    records = [Record(key, data, (Caption("a picture of something"),), "planted") for key, data in files]
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), records, records_per_shard=64)
        score(folder, filters=CHEAP, workers=1, progress=False)
        return select(folder, thresholds)


def near_duplicates(pictures: Sequence[Image.Image], kind: str) -> tuple[float, float]:
    """Recall and precision of duplicates if each image has a copy of this kind (`real_images.COPIES`).

    The original or the copy may be kept: the one with more pixels.
    """
    files = [(f"a/{i:04d}", bytes_of(picture)) for i, picture in enumerate(pictures)]
    files += [(f"b/{i:04d}", COPIES[kind](picture)) for i, picture in enumerate(pictures)]
    selection = select_files(files, Thresholds(min_side=64))  # small enough for copies of half size
    dropped = {key: why for key, why in selection.dropped.items() if why.step == "duplicates"}
    right = sum(key[2:] == (why.duplicate_of or "")[2:] for key, why in dropped.items())
    return right / len(pictures), right / max(1, len(dropped))


def pages(count: int) -> Iterator[tuple[str, bytes]]:
    """Pages of text, slides and forms of many sizes, half of them as JPEG."""
    for i in range(count):
        rng = np.random.default_rng(i)
        width, height = (int(side) for side in rng.integers(400, 1200, 2))
        dark = rng.random() < 0.2
        paper, ink = (
            ("#10243f", "#f2f2f2") if dark else (("white", "black") if rng.random() < 0.6 else ("#f7f3e8", "#333"))
        )
        image = Image.new("RGB", (width, height), paper)
        draw, size = ImageDraw.Draw(image), int(rng.integers(12, 40))
        font, y = ImageFont.load_default(size), int(rng.integers(20, 80))
        if rng.random() < 0.4:  # a slide
            draw.text((40, y), " ".join(rng.choice(WORDS, 2)), ink, ImageFont.load_default(2 * size))
            y += 3 * size
        for _ in range(int(rng.integers(1, 40))):
            line = " ".join(rng.choice(WORDS, int(rng.integers(2, 12))))
            draw.text((40, y), line, ink, font)
            y += int(1.5 * size)
            if y > height - 2 * size:
                break
        if rng.random() < 0.2:  # a form
            for row in range(int(rng.integers(2, 9))):
                draw.rectangle((40, height // 2 + row * 30, width - 40, height // 2 + row * 30 + 24), outline=ink)
        jpeg = rng.random() < 0.5
        quality = int(rng.integers(40, 95))
        yield f"page/{i:04d}", bytes_of(image, quality=quality) if jpeg else bytes_of(image, "PNG")


def worthless(count: int) -> Iterator[tuple[str, bytes]]:
    """Noise and flat images in turn: enlarged, blurred, faint, coloured, as PNG or JPEG."""
    for i in range(count):
        rng = np.random.default_rng(i)
        size = tuple(int(side) for side in rng.integers(300, 800, 2))
        if i % 2:
            image = Image.new("RGB", size, tuple(int(level) for level in rng.integers(0, 256, 3)))
        else:
            channels = 3 if rng.random() < 0.5 else 1
            levels = rng.normal(128, float(rng.uniform(6, 80)), (size[1], size[0], channels))
            pixels = np.broadcast_to(levels.clip(0, 255).astype(np.uint8), (size[1], size[0], 3))
            image = Image.fromarray(np.ascontiguousarray(pixels))
            change = rng.integers(4)
            if change == 1:
                image = image.resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC)
            elif change == 2:
                image = image.filter(ImageFilter.GaussianBlur(1))
        jpeg = rng.random() < 0.5
        kind = "flat" if i % 2 else "noise"
        data = bytes_of(image, quality=int(rng.integers(30, 95))) if jpeg else bytes_of(image, "PNG")
        yield f"{kind}/{i:04d}", data


def repetitions(pictures: Sequence[Image.Image], kind: str | None, opacity: float = 0.4) -> Float[np.ndarray, " n"]:
    """Scores of `filters.watermark` under a kind of watermark (`real_images.watermark`), or without one (None)."""
    texts, found = ("SAMPLE", "stock-photo.com", "© 2026 J. Doe"), []
    for index, picture in enumerate(pictures):
        if kind is not None:
            picture = watermark(picture, kind, opacity, texts[index % len(texts)])
        data = bytes_of(picture)
        record = Record("key", data, (Caption("x"),), "planted")
        found += WATERMARK.score([Candidate(record, decode_image(data, preview_first=True), None)])
    return np.array([row["repetition"] for row in found])
