"""Pictures of samples on one sheet: side by side and below each other, titles above the columns, a text under each."""

import bisect
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between pictures
# Letters are at least so high, and of a large cell this share: they stay readable where the sheet is shown reduced.
LEAST_LETTERS, LETTERS = 11, 1 / 20


def lay_out(
    samples: Sequence[Sequence[Image.Image]], titles: Sequence[str], texts: Sequence[str], across: int
) -> Image.Image:
    """The sheet; every cell is as large as the largest picture, and as wide as the longest title.

    Args:
      samples: of each its pictures (RGB), in the order of `titles`.
      titles: of the columns, ASCII.
      texts: of each sample, ASCII; cut to the width of its pictures.
      across: samples beside each other, if there are so many.
    """
    pictures = [picture for own in samples for picture in own]
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    size = max(LEAST_LETTERS, round(max(width, height) * LETTERS))
    font, line = ImageFont.load_default(size), 2 * size
    width = max(width, *(math.ceil(font.getlength(title)) for title in titles))
    across = min(across, len(samples))
    own_width = len(titles) * (width + GAP) - GAP
    group, row = own_width + 3 * GAP, height + line + GAP
    sheet = Image.new("RGB", (across * group + GAP, -(-len(samples) // across) * row + line), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(across):
        for place, title in enumerate(titles):
            pen.text((column * group + place * (width + GAP) + GAP, size // 2), title, "black", font)
    for index, (own, text) in enumerate(zip(samples, texts, strict=True)):
        left, top = (index % across) * group + GAP, index // across * row + line
        for place, picture in enumerate(own):
            shift = (width - picture.width) // 2, (height - picture.height) // 2
            sheet.paste(picture, (left + place * (width + GAP) + shift[0], top + shift[1]))
        pen.text((left, top + height + size // 3), _cut(text, font, own_width), "black", font)
    return sheet


def in_ascii(text: str) -> str:
    """A text in one line as Pillow's own font can draw it; one in other letters is replaced by its length."""
    return " ".join(text.split()) if text.isascii() else f"({len(text)} characters that this font lacks)"


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or as much of its beginning as is at most so wide, and three dots."""
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(f"{text[:count]}..."))
    return f"{text[: max(0, fits - 1)]}..."
