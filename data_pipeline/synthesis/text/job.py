"""Shared by all strategies: random numbers, words and typefaces of a sample, and a canvas that records its texts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from data_pipeline.buckets import Bucket
from data_pipeline.records.schema import Line
from data_pipeline.synthesis.lettering.colours import COLOURS
from data_pipeline.synthesis.lettering.fonts import FontLibrary, Typeface
from data_pipeline.synthesis.lettering.linebreak import shorten
from data_pipeline.synthesis.lettering.scripts import DISPLAY, Script, language_name
from data_pipeline.synthesis.lettering.typesetting import Block, Colour, Style, Unsuitable, draw_block, set_text
from data_pipeline.synthesis.text.corpus import Corpus
from data_pipeline.synthesis.text.scenes import Scene, Scenes
from qi2_jax.text.qwen_tokenizer import build_qwen_tokenizer

Choice = TypeVar("Choice")
MAX_CAPTION_TOKENS = 1024
DESCRIPTION_TOKENS = 320  # reserved for the words around the quotations
MIN_QUOTED_TOKENS = 6  # least tokens of a quotation; fewer are not a word in most scripts


@functools.cache
def _tokenizer() -> Any:
    return build_qwen_tokenizer()


def count_tokens(text: str) -> int:
    """Number of tokens of Qwen's tokenizer."""
    return len(_tokenizer()(text).input_ids)


@dataclass(frozen=True)
class Sample:
    """A finished image with its caption.

    Attributes:
      texts: texts written in the image, in the order in which the caption quotes them.
      licence: licence of a photograph in the image; None without a photograph.
      lines: lines of these texts with their places in the image.
    """

    image: Image.Image
    caption: str
    texts: tuple[str, ...]
    tags: tuple[str, ...]
    licence: str | None = None
    lines: tuple[Line, ...] = ()


@dataclass
class Job:
    """The inputs for drawing one sample.

    Attributes:
      rng: source of all random numbers of the sample.
      sizes: possible sizes, from the tallest to the widest.
      scenes: photographs to write on; None if the strategy needs none.
      budget: number of tokens that may still be quoted.
    """

    rng: np.random.Generator
    script: Script
    language: str
    corpus: Corpus
    fonts: FontLibrary
    sizes: tuple[Bucket, ...]
    scenes: Scenes | None
    budget: int = MAX_CAPTION_TOKENS - DESCRIPTION_TOKENS

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *choices: Choice) -> Choice:
        return choices[self.rng.integers(len(choices))]

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def size(self, suits: Callable[[Bucket], bool] = lambda size: True) -> tuple[int, int]:
        """Width and height of a random suitable size."""
        size = self.pick(*[size for size in self.sizes if suits(size)])
        # Rounding to the grid can make 1:3 a little longer, and selection drops aspect ratios above 3.
        return min(size.width, 3 * size.height), min(size.height, 3 * size.width)

    def typeface(self, *, bold: bool | None = None, style: str | None = None, title: bool = False) -> Typeface:
        """A random typeface of the script; titles may also use typefaces for large sizes."""
        return self.pick(
            *[
                typeface
                for typeface in self.fonts.typefaces[self.script.code]
                if bold in (None, typeface.bold)
                and style in (None, typeface.style)
                and (title or not typeface.style.endswith(DISPLAY))
            ]
        )

    def paragraph(self, max_tokens: int = MAX_CAPTION_TOKENS) -> str:
        """A paragraph of at most `max_tokens` tokens, cut after a sentence or word. Raises Unsuitable."""
        return self._spend(self.corpus.paragraph(self.rng, self.script.code, self.language), max_tokens)

    def phrase(self) -> str:
        """A title or label. Raises Unsuitable."""
        return self._spend(self.corpus.phrase(self.rng, self.script.code, self.language), 60)

    def _spend(self, text: str, max_tokens: int) -> str:
        """Shortens a text to the limit and the budget, from which its tokens are subtracted."""
        max_tokens = min(max_tokens, self.budget)
        shortened = None
        if max_tokens >= MIN_QUOTED_TOKENS:
            shortened = shorten(text, self.language, lambda beginning: count_tokens(beginning) <= max_tokens)
        if shortened is None:
            raise Unsuitable("caption_too_long", text)
        self.budget -= count_tokens(shortened) + 2  # including the quotation marks
        return shortened

    def scene(self) -> Scene:
        """A random photograph. Raises Unsuitable."""
        assert self.scenes is not None
        return self.scenes.draw(self.rng)

    @property
    def writing(self) -> str:
        """The names of the script and language, such as `Hebrew script` or `Cyrillic script (Russian)`."""
        language = language_name(self.language)
        if language is None or language.startswith(self.script.name):
            return f"{self.script.name} script"
        if language.split()[-1] in self.script.name:
            return self.script.name
        return f"{self.script.name} script ({language})"


@dataclass
class Canvas:
    """An image that is being drawn, and the texts and lines written on it, in order.

    Attributes:
      small: whether text may be smaller than the legible size of its script.
    """

    job: Job
    image: Image.Image
    texts: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    small: bool = False

    @classmethod
    def plain(cls, job: Job, size: tuple[int, int], colour: str) -> "Canvas":
        return cls(job, Image.new("RGB", size, COLOURS[colour]))

    @property
    def unit(self) -> float:
        """A thousandth of the side of a square with the image's area, in pixels; all sizes are multiples of it."""
        return (self.image.width * self.image.height) ** 0.5 / 1000

    def write(
        self,
        text: str,
        box: tuple[float, float, float, float],
        style: Style,
        colour: str | Colour | int,
        place: str = "top",
    ) -> Block:
        """Typesets a text in a box (left, top, right, bottom), at its top, middle or bottom. Raises Unsuitable."""
        left, top, right, bottom = box
        block = set_text(text, self.job.language, self.legible(style), right - left, bottom - top)
        if not style.vertical:
            slack = (bottom - top) - block.extent
            top += {"top": 0.0, "middle": slack / 2, "bottom": slack}[place]
        self.draw(block, left, top, colour)
        return block

    def legible(self, style: Style) -> Style:
        """The style with legible sizes, unless the canvas is for small text."""
        if self.small:
            return style
        least = self.job.script.legible
        return replace(style, size=max(style.size, least), minimum=max(style.minimum, least))

    def draw(self, block: Block, left: float, top: float, colour: str | Colour | int) -> None:
        """Draws a typeset block. Raises Unsuitable."""
        boxes = draw_block(self.image, block, left, top, COLOURS[colour] if isinstance(colour, str) else colour)
        self.texts.append(block.text)
        # A line of spaces alone, or of glyphs without ink, shows nothing.
        self.lines += [
            Line(text, box)
            for text, box in zip(block.lines, boxes, strict=True)
            if text.strip() and box[0] < box[2] and box[1] < box[3]
        ]


def quote(text: str) -> str:
    """A text in the quotation marks of captions."""
    return f"“{text}”"


def with_article(noun: str) -> str:
    """A noun with its indefinite article, such as `an ivory ground`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def join_parts(parts: list[str]) -> str:
    """Joins parts of a sentence with commas."""
    return ", ".join(parts)


def describe_alignment(align: str, script: Script) -> str:
    """An alignment in words."""
    if align == "centre":
        return "centred"
    return "aligned to the " + ("right" if (align == "end") != script.rtl else "left")
