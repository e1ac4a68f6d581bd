"""A grid of samples: images in rows and columns, titles above the columns, a text below each sample."""

import bisect
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between images
# Minimum height of letters in pixels, and their share of a large cell, so that a reduced grid stays readable.
MIN_LETTER_HEIGHT, LETTER_SHARE = 11, 1 / 20


def lay_out(
    samples: Sequence[Sequence[Image.Image]], titles: Sequence[str], texts: Sequence[str], across: int
) -> Image.Image:
    """Draws the grid. Every cell is as large as the largest image, and as wide as the longest title.

    Args:
      samples: images (RGB) of each sample, in the order of `titles`.
      titles: titles of the columns, ASCII.
      texts: text of each sample, ASCII. It is cut to the width of the sample's images.
      across: largest number of samples in a row.
    """
    images = [image for sample in samples for image in sample]
    width, height = max(image.width for image in images), max(image.height for image in images)
    size = max(MIN_LETTER_HEIGHT, round(max(width, height) * LETTER_SHARE))
    font, line = ImageFont.load_default(size), 2 * size
    width = max(width, *(math.ceil(font.getlength(title)) for title in titles))
    across = min(across, len(samples))
    sample_width = len(titles) * (width + GAP) - GAP
    group, row = sample_width + 3 * GAP, height + line + GAP
    grid = Image.new("RGB", (across * group + GAP, -(-len(samples) // across) * row + line), "white")
    pen = ImageDraw.Draw(grid)
    for column in range(across):
        for place, title in enumerate(titles):
            pen.text((column * group + place * (width + GAP) + GAP, size // 2), title, "black", font)
    for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        left, top = (index % across) * group + GAP, index // across * row + line
        for place, image in enumerate(sample):
            shift = (width - image.width) // 2, (height - image.height) // 2
            grid.paste(image, (left + place * (width + GAP) + shift[0], top + shift[1]))
        pen.text((left, top + height + size // 3), _cut(text, font, sample_width), "black", font)
    return grid


def in_ascii(text: str) -> str:
    """A text in one line, for Pillow's built-in font; a note with its length if it is not ASCII."""
    return " ".join(text.split()) if text.isascii() else f"({len(text)} characters that this font lacks)"


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or its beginning and three dots if it is wider than `width`."""
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(f"{text[:count]}..."))
    return f"{text[: max(0, fits - 1)]}..."
