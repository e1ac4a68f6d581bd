"""Small text, 5 to 20 pixels high, at many places of a photograph, for training the autoencoder at all resolutions."""

from typing import NamedTuple

from PIL import Image, ImageOps

from data_pipeline.synthesis.lettering.colours import readable_on
from data_pipeline.synthesis.lettering.typesetting import Block, Box, Style, Unsuitable, set_text
from data_pipeline.synthesis.text.glyphs import LARGEST, SMALLEST, extremes
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, quote

MAX_UPSCALE = 1.5  # of the photograph; a smaller one gives a smaller image
MIN_TEXTS, MAX_TEXTS = 4, 24
_TRIES = 3  # places that are tried for each text
_MARGIN = 20  # pixels at the edges of the image: ink may exceed the box of its text
_GRID = 32  # pixels


class _Text(NamedTuple):
    """A text with the box in which it is set."""

    box: Box
    block: Block
    colour: str


def draw_photo(job: Job) -> Sample:
    """Draws texts of different sizes that do not overlap. Raises Unsuitable."""
    scene = job.scene()
    canvas = Canvas(job, _fit(scene.image, job.size()), small=True)
    texts: list[_Text] = []
    for _ in range(int(job.rng.integers(MIN_TEXTS, MAX_TEXTS + 1))):
        try:
            texts += _place(canvas, [text.box for text in texts])
        except Unsuitable as reason:
            if reason.reason == "caption_too_long" and texts:  # nothing more can be quoted
                break
            if reason.reason != "does_not_fit":
                raise
    if not texts:
        raise Unsuitable("does_not_fit", "a photograph without a text")
    texts.sort(key=lambda text: (text.box[1], text.box[0]))
    for text in texts:
        canvas.draw(text.block, text.box[0], text.box[1], text.colour)
    quoted = "; ".join(f"{text.block.size} pixels, {text.colour}: {quote(text.block.text)}" for text in texts)
    caption = f"A photograph with small type in {job.writing} laid over it, from top to bottom: {quoted}."
    tags = ("synthetic/glyphs", "synthetic/photo")
    return Sample(canvas.image, caption, tuple(canvas.texts), tags, scene.licence, tuple(canvas.lines))


def _fit(photograph: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a photograph in a size, or in a smaller one with about its aspect ratio."""
    upscale = max(side / had for side, had in zip(size, photograph.size, strict=True))
    if upscale > MAX_UPSCALE:
        width, height = (int(side * MAX_UPSCALE / upscale) // _GRID * _GRID for side in size)
        size = min(max(width, _GRID), 3 * max(height, _GRID)), min(max(height, _GRID), 3 * max(width, _GRID))
    return ImageOps.fit(photograph, size, Image.Resampling.LANCZOS)


def _place(canvas: Canvas, taken: list[Box]) -> list[_Text]:
    """A text at a free place, as a list; empty if all tried places are taken. Raises Unsuitable."""
    job, (width, height) = canvas.job, canvas.image.size
    size = int(job.rng.integers(SMALLEST, LARGEST + 1))
    text = job.paragraph(job.pick(20, 40)) if job.chance(0.5) else job.phrase()
    across = min(int(size * job.between(8, 30)), width - 2 * _MARGIN)
    style = Style(job.typeface(), size, size, job.pick("start", "start", "centre"), job.between(1, 1.3))
    block = set_text(text, job.language, style, across, min(0.5 * height, height - 2 * _MARGIN))
    for _ in range(_TRIES):
        left = int(job.rng.integers(_MARGIN, width - _MARGIN - across + 1))
        top = int(job.rng.integers(_MARGIN, height - _MARGIN - block.extent + 1))
        box = (left, top, left + across, top + block.extent)
        if not any(_touch(box, other, size) for other in taken):
            return [_Text(box, block, readable_on(job.rng, *extremes(canvas.image.crop(box)), least=3.0))]
    return []


def _touch(box: Box, other: Box, gap: int) -> bool:
    """Whether two boxes are less than `gap` pixels apart."""
    return box[0] < other[2] + gap and other[0] < box[2] + gap and box[1] < other[3] + gap and other[1] < box[3] + gap
