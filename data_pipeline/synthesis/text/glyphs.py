"""Small glyphs, 5 to 20 pixels high, on plain or real backgrounds, for training the autoencoder."""

import numpy as np
from PIL import Image

from data_pipeline.synthesis.lettering.colours import choose, readable_on
from data_pipeline.synthesis.lettering.typesetting import Style, Unsuitable
from data_pipeline.synthesis.text.job import MIN_QUOTED_TOKENS, Canvas, Job, Sample, quote

SMALLEST, LARGEST = 5, 20  # pixels per em
SIDE = 384  # pixels per side of an image


def draw_glyphs(job: Job) -> Sample:
    """Draws lines of different sizes, one below the other, until the image or the caption is full."""
    canvas, ground, licence = _background(job)
    canvas.small = True
    side, margin = SIDE, 6
    y = float(margin)
    description: list[str] = []
    while y < side - margin - 2 * SMALLEST and job.budget > 4 * MIN_QUOTED_TOKENS:
        size = int(job.rng.integers(SMALLEST, LARGEST + 1))
        style = Style(job.typeface(), size, size)
        indent = job.between(0, 0.2) * side
        left, right = (margin, side - margin - indent) if job.script.rtl else (margin + indent, side - margin)
        text = job.paragraph(60) if job.chance(0.5) else job.phrase()
        box = (left, y, right, side - margin)
        spot = canvas.image.crop((int(left), int(y), int(right), min(side, int(y) + 3 * size)))
        colour = readable_on(job.rng, *extremes(spot), least=3.0)
        before = canvas.image.copy()
        try:
            block = canvas.write(text, box, style, colour)
        except Unsuitable as reason:
            if reason.reason != "does_not_fit" or not description:
                raise
            canvas.image.paste(before)  # without a part of the text
            break
        y += block.extent + job.between(0, 0.6) * size
        description.append(f"{size} pixels, {colour}: {quote(text)}")
    caption = f"Lines of small type in {job.writing} on {ground}, from top to bottom: {'; '.join(description)}."
    return Sample(canvas.image, caption, tuple(canvas.texts), ("synthetic/glyphs",), licence, tuple(canvas.lines))


def _background(job: Job) -> tuple[Canvas, str, str | None]:
    if job.chance(0.4):
        colour = choose(job.rng)
        return Canvas.plain(job, (SIDE, SIDE), colour), f"a plain {colour} ground", None
    scene = job.scene()
    scale = max(1.0, SIDE / min(scene.image.size), job.between(0.3, 1.0))
    width, height = (max(SIDE, round(side * scale)) for side in scene.image.size)
    left, top = int(job.rng.integers(0, width - SIDE + 1)), int(job.rng.integers(0, height - SIDE + 1))
    box = tuple(value / scale for value in (left, top, left + SIDE, top + SIDE))
    box = (box[0], box[1], min(box[2], scene.image.width), min(box[3], scene.image.height))
    image = scene.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
    return Canvas(job, image), "a photograph", scene.licence


def extremes(image: Image.Image) -> tuple[tuple[int, int, int], ...]:
    """The 10th and the 90th percentile of each channel."""
    pixels = np.percentile(np.asarray(image).reshape(-1, 3), (10, 90), axis=0).astype(int)
    return tuple((int(red), int(green), int(blue)) for red, green, blue in pixels)
