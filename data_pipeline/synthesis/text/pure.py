"""Pure text: paragraphs on plain backgrounds in random layouts."""

import unicodedata
from dataclasses import replace

import numpy as np
from PIL import Image

from data_pipeline.synthesis.lettering.colours import COLOURS, choose, contrast, readable_on
from data_pipeline.synthesis.lettering.linebreak import graphemes, sentences
from data_pipeline.synthesis.lettering.typesetting import Block, Colour, Style, set_paragraphs
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, describe_alignment, quote, with_article

_NUMBERS = ("", "one", "two", "three")


def draw_pure(job: Job) -> Sample:
    """Draws a page in one to three columns, or in vertical columns for Chinese, Japanese and Korean."""
    size = job.size()
    canvas, ground, colours = _background(job, size)
    unit = canvas.unit
    texts = [job.paragraph(job.pick(60, 120, 300, 600))]
    upright = _upright_sentences(job, texts[0]) if job.chance(0.5) else ""
    vertical = bool(upright)
    texts = [upright] if vertical else texts + [job.paragraph(200) for _ in range(int(job.rng.integers(3)))]
    margin_x, margin_y = size[0] * job.between(0.05, 0.13), size[1] * job.between(0.05, 0.13)
    left, top, right, bottom = margin_x, margin_y, size[0] - margin_x, size[1] - margin_y
    bold = job.chance(0.25)
    description = [f"A page of text on {with_article(ground)} ground."]

    if job.chance(0.5) and not vertical:
        colour = readable_on(job.rng, *colours)
        align = job.pick("start", "centre")
        style = Style(job.typeface(bold=True, title=True), round(unit * job.between(44, 80)), round(unit * 28), align)
        block = canvas.write(job.phrase(), (left, top, right, top + 0.25 * (bottom - top)), style, colour)
        top += block.extent + unit * job.between(16, 40)
        description.append(
            f"The title at the top, {describe_alignment(align, job.script)} in {colour}, reads {quote(block.text)}."
        )

    colour, typeface = readable_on(job.rng, *colours), job.typeface(bold=bold)
    align = "start" if vertical else job.pick("start", "start", "centre", "end")
    # At this size the text fills a random share of the page: a glyph takes 0.8 square em on average, with leading.
    characters = sum(len(graphemes(text, job.language)) for text in texts)
    filling = (job.between(0.2, 0.9) * (right - left) * (bottom - top) / (0.8 * characters)) ** 0.5
    style = Style(
        typeface, round(min(max(filling, 18 * unit), 110 * unit)), round(unit * 17), align, job.between(1, 1.35)
    )
    blocks, columns = _write(job, canvas, texts, style, (left, top, right, bottom), colour, vertical)
    manner = (
        "set in vertical columns that run from right to left" if vertical else describe_alignment(align, job.script)
    )
    if columns > 1:
        manner += f" in {_NUMBERS[columns]} columns"
    height, weight = _height(blocks[0].size, unit), "bold " if bold else ""
    amount = "reads" if len(texts) == 1 else f"makes {_NUMBERS[len(texts)]} paragraphs that read"
    quoted = ", ".join(quote(text) for text in texts)
    description.append(
        f"{height} {weight}{typeface.style} type in {colour}, {manner}, in {job.writing}, {amount} {quoted}."
    )
    tags = ("synthetic/text", "vertical") if vertical else ("synthetic/text",)
    return Sample(canvas.image, " ".join(description), tuple(canvas.texts), tags, lines=tuple(canvas.lines))


def _write(
    job: Job,
    canvas: Canvas,
    texts: list[str],
    style: Style,
    box: tuple[float, float, float, float],
    colour: str,
    vertical: bool,
) -> tuple[list[Block], int]:
    """Writes the paragraphs; returns their blocks and the number of columns."""
    left, top, right, bottom = box
    unit, style = canvas.unit, canvas.legible(style)
    if len(texts) > 1:
        space = job.between(0.4, 1.2)
        blocks = set_paragraphs(texts, job.language, style, right - left, bottom - top, space)
        for block in blocks:
            canvas.draw(block, left, top, colour)
            top += block.extent + space * block.size
        return blocks, 1
    columns = 1
    if not vertical and right - left > 24 * style.size:  # narrower columns have room for too few words
        columns = int(job.rng.integers(1, 1 + min(3, int((right - left) / (12 * style.size)))))
    style = replace(style, columns=columns, gap=round(unit * 40), vertical=vertical)
    block = canvas.write(texts[0], box, style, colour, job.pick("top", "middle"))
    return [block], 1 if vertical else -(-len(block.lines) // block.rows)


def _upright_sentences(job: Job, text: str) -> str:
    """The sentences of a text that can be set vertically: those with only full-width characters."""
    if not job.script.vertical:
        return ""
    stripped = [sentence.strip() for sentence in sentences(text, job.language)]
    return "".join(s for s in stripped if all(unicodedata.east_asian_width(character) in "WF" for character in s))


def _height(size: int, unit: float) -> str:
    return "Small" if size < 26 * unit else "Large" if size > 50 * unit else "Medium-sized"


def _background(job: Job, size: tuple[int, int]) -> tuple[Canvas, str, tuple[Colour, ...]]:
    """A canvas, plain or with a gradient between two similar colours, and its colours in words and as RGB."""
    first = choose(job.rng)
    alike = tuple(name for name in COLOURS if name != first and contrast(COLOURS[name], COLOURS[first]) < 1.4)
    if not alike or job.chance(0.6):
        return Canvas.plain(job, size, first), f"plain {first}", (COLOURS[first],)
    second = choose(job.rng, alike)
    a, b = (np.asarray(COLOURS[name], dtype=np.float32) for name in (first, second))
    share = np.linspace(0, 1, size[1], dtype=np.float32)[:, None, None]
    pixels = np.broadcast_to(a * (1 - share) + b * share, (size[1], size[0], 3))
    image = Image.fromarray(np.round(pixels).astype(np.uint8))
    return Canvas(job, image), f"{first} to {second}", (COLOURS[first], COLOURS[second])
