"""Typesetting: fits a whole text into a box, in horizontal or vertical lines and in one or more columns.

Pillow shapes the text (raqm: HarfBuzz and FriBidi). Lengths are in pixels; the size of a font is its em.
"""

import dataclasses
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data_pipeline.synthesis.lettering.fonts import FontFile, MissingGlyph, Typeface, at_size
from data_pipeline.synthesis.lettering.linebreak import break_lines

SHRINK = 0.9  # factor from one tried size to the next
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom

REASONS = {
    "missing_glyph": "a character that no font of the typeface has",
    "does_not_fit": "a text that is too long for its box at the smallest size",
    "caption_too_long": "a text without a word that fits into the caption",
    "empty_corpus": "the corpus has no text in the script",
    "broken_scene": "a scene image that cannot be decoded or is too small",
}


class Unsuitable(Exception):
    """A text or image that cannot be used.

    Attributes:
      reason: key of REASONS.
      text: text, or name of the image.
    """

    def __init__(self, reason: str, text: str):
        super().__init__(f"{reason}: {text[:80]}")
        self.reason, self.text = reason, text


@dataclass(frozen=True)
class Style:
    """The desired appearance of a text.

    Attributes:
      size: desired size in pixels per em.
      minimum: least acceptable size in pixels per em.
      align: `start` (left, or right in right-to-left scripts), `centre` or `end`.
      leading: line spacing as a multiple of the line height, which is 1.3 em for vertical columns.
      columns: number of columns.
      gap: pixels between two columns.
      vertical: whether lines are vertical columns, right to left.
    """

    typeface: Typeface
    size: int
    minimum: int
    align: str = "start"
    leading: float = 1.0
    columns: int = 1
    gap: int = 0
    vertical: bool = False


@dataclass(frozen=True)
class Block:
    """A text divided into lines, ready for drawing.

    Attributes:
      lines: lines without the spaces at their ends.
      size: size that fits, in pixels per em.
      pitch: pixels from one line, or vertical column, to the next.
      rows: number of lines per column.
      width, height: size of the box.
    """

    text: str
    language: str
    lines: tuple[str, ...]
    style: Style
    size: int
    pitch: int
    rows: int
    width: int
    height: int

    @property
    def extent(self) -> int:
        """Extent in pixels of the lines from top to bottom, or of the vertical columns from right to left."""
        return self.pitch * min(self.rows, len(self.lines))


def line_height(typeface: Typeface, size: int) -> int:
    """Pixels from the highest ascender to the lowest descender of the fonts of a typeface."""
    return sum(max(metrics) for metrics in zip(*(at_size(f, size).getmetrics() for f in typeface.files), strict=True))


def length(text: str, typeface: Typeface, size: int, language: str, vertical: bool = False) -> float:
    """The length of a line. Raises Unsuitable for a missing glyph."""
    direction = _direction(typeface, vertical)
    runs = _runs(text, typeface, language)
    return sum(at_size(f, size).getlength(run, direction=direction, language=language) for f, run in runs)


def set_text(text: str, language: str, style: Style, width: float, height: float) -> Block:
    """Divides a text into lines that fit a box, at the largest size from `style.size` down to `style.minimum`.

    Raises:
      Unsuitable: `missing_glyph` or `does_not_fit`.
    """
    width, height = int(width), int(height)
    columns = style.columns
    column = (width - style.gap * (columns - 1)) // columns
    along, across = (height, column) if style.vertical else (column, height)
    reference = 100
    lengths: dict[str, float] = {}

    def measured(piece: str) -> float:
        if piece not in lengths:
            lengths[piece] = length(piece, style.typeface, reference, language, style.vertical)
        return lengths[piece]

    size = float(style.size)
    while size >= style.minimum:
        whole = int(size)
        height_of_line = 1.3 * whole if style.vertical else line_height(style.typeface, whole)
        pitch = round(style.leading * height_of_line)
        rows = across // pitch
        # Lengths are proportional to the size except for rounding, so one measurement serves all sizes. The finished
        # lines are measured again.
        lines = break_lines(text, language, along * reference / whole, measured) if rows else None
        if lines is not None and len(lines) <= rows * columns:
            longest = max(length(line, style.typeface, whole, language, style.vertical) for line in lines)
            if longest <= along:
                return Block(text, language, tuple(lines), style, whole, pitch, rows, width, height)
        size *= SHRINK
    raise Unsuitable("does_not_fit", text)


def set_paragraphs(
    texts: list[str], language: str, style: Style, width: float, height: float, space: float
) -> list[Block]:
    """Typesets paragraphs one below the other in a box, all at the largest size that fits.

    Args:
      texts: paragraphs.
      language: BCP 47 tag of the paragraphs.
      style: desired appearance.
      width, height: size of the box.
      space: space between two paragraphs, in em.

    Raises:
      Unsuitable: `missing_glyph` or `does_not_fit`.
    """
    size = float(style.size)
    while size >= style.minimum:
        exact = dataclasses.replace(style, size=int(size), minimum=int(size))
        try:
            blocks = [set_text(text, language, exact, width, height) for text in texts]
        except Unsuitable as unsuitable:
            if unsuitable.reason != "does_not_fit":
                raise
        else:
            if sum(block.extent for block in blocks) + space * int(size) * (len(texts) - 1) <= height:
                return blocks
        size *= SHRINK
    raise Unsuitable("does_not_fit", texts[0])


def draw_block(image: Image.Image, block: Block, left: float, top: float, colour: Colour | int) -> list[Box]:
    """Draws a block with its box at (left, top).

    Returns:
      The box of the ink of every line, in whole pixels; it is empty if the line has no ink.

    Raises:
      Unsuitable: `does_not_fit` if the text would exceed the image; the image is then partly drawn.
    """
    draw = ImageDraw.Draw(image)
    style, rtl = block.style, block.style.typeface.script.rtl
    column = (block.width - style.gap * (style.columns - 1)) // style.columns
    boxes = []
    for number, line in enumerate(block.lines):
        place, row = divmod(number, block.rows)
        if rtl or style.vertical:  # columns follow the reading direction
            place = style.columns - 1 - place
        x = left + place * (column + style.gap)
        if style.vertical:
            boxes.append(_draw_vertical(draw, block, line, x + column - block.pitch * (row + 0.5), top, colour))
            continue
        slack = column - length(line, style.typeface, block.size, block.language)
        at_right = (style.align == "end") != rtl
        x += slack / 2 if style.align == "centre" else slack if at_right else 0
        ascent = max(at_size(file, block.size).getmetrics()[0] for file in style.typeface.files)
        boxes.append(_draw_line(draw, block, line, x, top + row * block.pitch + ascent, colour))
    return boxes


def _draw_line(
    draw: ImageDraw.ImageDraw, block: Block, line: str, x: float, baseline: float, colour: Colour | int
) -> Box:
    typeface = block.style.typeface
    direction = _direction(typeface)
    runs = _runs(line, typeface, block.language)
    boxes = []
    for file, run in reversed(runs) if typeface.script.rtl else runs:
        boxes.append(_draw_run(draw, block, file, run, (round(x), round(baseline)), "ls", direction, colour))
        x += at_size(file, block.size).getlength(run, direction=direction, language=block.language)
    lefts, tops, rights, bottoms = zip(*boxes, strict=True) if boxes else ((0,),) * 4
    return min(lefts), min(tops), max(rights), max(bottoms)


def _draw_vertical(
    draw: ImageDraw.ImageDraw, block: Block, line: str, middle: float, top: float, colour: Colour | int
) -> Box:
    if block.style.align == "end":
        top += block.height - length(line, block.style.typeface, block.size, block.language, vertical=True)
    ((file, run),) = _runs(line, block.style.typeface, block.language)
    return _draw_run(draw, block, file, run, (round(middle), round(top)), "st", "ttb", colour)


def _draw_run(
    draw: ImageDraw.ImageDraw,
    block: Block,
    file: FontFile,
    run: str,
    at: tuple[int, int],
    anchor: str,
    direction: str,
    colour: Colour | int,
) -> Box:
    font, language = at_size(file, block.size), block.language
    box = draw.textbbox(at, run, font=font, anchor=anchor, direction=direction, language=language)
    width, height = draw.im.size
    if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
        raise Unsuitable("does_not_fit", block.text)
    draw.text(at, run, fill=colour, font=font, anchor=anchor, direction=direction, language=language)
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])


def _direction(typeface: Typeface, vertical: bool = False) -> str:
    return "ttb" if vertical else "rtl" if typeface.script.rtl else "ltr"


def _runs(text: str, typeface: Typeface, language: str) -> tuple[tuple[FontFile, str], ...]:
    try:
        return typeface.runs(text, language)
    except MissingGlyph as missing:
        raise Unsuitable("missing_glyph", f"{missing} in {text}") from None
