"""What a job shows in the end: one picture of all samples, and how near each lies to its training image."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_pipeline.images import over_white

THUMB = 64  # pixels per side at which pictures are compared, whatever their shape
CELL, GAP, TEXT_HEIGHT, COLUMNS = 136, 6, 30, 3


def nearest_is_own(
    samples: Sequence[UInt8[np.ndarray, "H W c"]],
    pictures: Iterable[UInt8[np.ndarray, "H W c"]],
    owners: Sequence[int],
) -> list[bool]:
    """For each sample, whether its own training picture is the nearest of all: mean squared error of RGB thumbnails.

    Args:
      samples, pictures: pixels 0..255, of any sizes; alpha is laid over white. Pictures are looked at one by one.
      owners: for each sample the index of its own picture.
    """
    ours = np.stack([_thumb(sample) for sample in samples])
    nearest, least = np.zeros(len(samples), int), np.full(len(samples), np.inf)
    for index, picture in enumerate(pictures):
        distances = np.mean((ours - _thumb(picture)) ** 2, axis=(1, 2, 3))
        nearest[distances < least] = index
        least = np.minimum(least, distances)
    return (nearest == np.asarray(owners)).tolist()


def _thumb(pixels) -> Float[np.ndarray, "64 64 3"]:
    image = over_white(Image.fromarray(pixels))
    return np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), np.float32)


def draw(
    path: pathlib.Path,
    texts: Sequence[str],
    triples: Sequence[tuple[UInt8[np.ndarray, "H W c"], ...]],
    titles: Sequence[str],
) -> None:
    """Writes one picture: for each text its images side by side, with `titles` above each column of images."""
    count = len(titles)
    width, height = count * (CELL + GAP) + GAP, CELL + TEXT_HEIGHT
    rows = -(-len(texts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + TEXT_HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column in range(COLUMNS):
        for place, title in enumerate(titles):
            pen.text((column * width + GAP + place * (CELL + GAP), 8), title, "black", font)
    for index, (text, images) in enumerate(zip(texts, triples, strict=True)):
        left, top = (index % COLUMNS) * width + GAP, (index // COLUMNS) * height + TEXT_HEIGHT
        for place, pixels in enumerate(images):
            image = over_white(Image.fromarray(pixels))
            image = ImageOps.contain(image, (CELL, CELL), Image.Resampling.LANCZOS)
            corner = (left + place * (CELL + GAP) + (CELL - image.width) // 2, top + (CELL - image.height) // 2)
            sheet.paste(image, corner)
        shown = " ".join(text.split()) if text.isascii() else f"({len(text)} characters that this font lacks)"
        while pen.textlength(shown, font) > width - 2 * GAP:
            shown = shown[:-2].rstrip("…") + "…"
        pen.text((left, top + CELL + 4), shown, "black", font)
    sheet.save(path)
