"""Text in real scenes: painted on a smooth surface or on a sheet in front of it, with matching perspective and light.

The image's blurred brightness shades the text, and its remaining detail shows through paint as texture. Sharpness and
noise of the image are measured and matched (`surfaces`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from data_pipeline.records.schema import Line
from data_pipeline.synthesis.lettering.colours import COLOURS, readable_on
from data_pipeline.synthesis.lettering.typesetting import Colour, Style
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, describe_alignment, quote, with_article
from data_pipeline.synthesis.text.surfaces import (
    Window,
    estimate_light,
    find_window,
    luma,
    make_sheet,
    perspective,
    warp,
    warped_box,
)

MIN_SIDE, MAX_SIDE = 640, 1536  # least shorter side and largest longer side of an image, in pixels
MAX_UPSCALE = 1.5
MAX_PAINTED_ROUGHNESS = 18.0  # largest roughness of a surface for painted text
SHEETS = {
    "paper": ("white", "ivory", "pale yellow", "pale blue", "pale pink"),
    "wooden board": ("brown",),
    "painted sign": ("yellow", "red", "dark blue", "dark green", "white", "black"),
    "fabric banner": ("red", "purple", "turquoise", "ivory", "dark blue"),
}
_MARGIN = 40  # pixels
_SMALLEST = 16  # pixels per em on the sheet, before the perspective


@dataclass(frozen=True)
class _Writing:
    """A sheet seen from the front, and the style of the text on it.

    Attributes:
      front: colours of the sheet.
      cover: opacity of the sheet, 0..255.
      beyond: colour outside the edges of the sheet, so that the edges do not fade into black.
      on: description of the surface, for the caption.
      lines: lines of the text with their places on the sheet.
    """

    front: Image.Image
    cover: Image.Image
    beyond: Colour
    text: str
    style: Style
    ink: str
    on: str
    lines: tuple[Line, ...]


def draw_scene(job: Job) -> Sample:
    """Draws text on a surface in a photograph. Raises Unsuitable."""
    scene = job.scene()
    image = _fit(scene.image)
    pixels = np.asarray(image, dtype=np.float32)
    window = find_window(job.rng, luma(pixels))
    painted = window.roughness < MAX_PAINTED_ROUGHNESS and job.chance(0.5)
    if painted:
        writing = _paint(job, window, np.median(pixels[window.slices].reshape(-1, 3), axis=0))
    else:
        writing = _sheet(job, window)

    # Only the window changes, and a margin around it for shadow and blur.
    around = window.grown(_MARGIN, image.size)
    size = (around.width, around.height)
    in_image = perspective(job.rng, writing.front.size, window)
    corners = in_image - np.asarray([around.left, around.top])
    light, behind = estimate_light(pixels, around), pixels[around.slices]
    blur = (light.blur, light.blur, 0)
    front = ndimage.gaussian_filter(warp(writing.front, corners, size, writing.beyond), blur) * light.shade
    cover = ndimage.gaussian_filter(warp(writing.cover, corners, size, 0)[..., None] / 255, blur)
    if painted:
        front, cover = front * light.texture, cover * 0.93
    else:
        shift = round(3 + window.width / 120)
        shadow = ndimage.gaussian_filter(ndimage.shift(cover, (shift, shift, 0), order=0), (shift, shift, 0))
        behind = behind * (1 - 0.45 * shadow)
    noise = job.rng.normal(0.0, light.noise, behind.shape[:2]).astype(np.float32)[..., None]
    out = behind * (1 - cover) + (front + noise) * cover
    result = image.copy()
    drawn = Image.fromarray(np.clip(np.round(out), 0, 255).astype(np.uint8))
    result.paste(drawn, (around.left, around.top))
    caption = _caption(job, writing, window, image.size)
    lines = tuple(Line(x.text, warped_box(x.box, in_image, writing.front.size)) for x in writing.lines)
    return Sample(result, caption, (writing.text,), ("synthetic/text", "synthetic/scene"), scene.licence, lines)


def _fit(image: Image.Image) -> Image.Image:
    """Resizes an image so that text on it will be legible."""
    scale = min(max(1.0, MIN_SIDE / min(image.size)), MAX_UPSCALE)
    scale = min(scale, MAX_SIDE / max(image.size))
    if scale == 1.0:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _paint(job: Job, window: Window, ground: Float[np.ndarray, "3"]) -> _Writing:
    """Letters painted directly on the surface."""
    red, green, blue = (int(value) for value in ground)
    ink = readable_on(job.rng, (red, green, blue))
    letters = Image.new("L", (window.width, window.height), 0)
    text, style, lines = _write(job, letters, 255, bold=True)
    front = Image.new("RGB", letters.size, COLOURS[ink])
    return _Writing(front, letters, COLOURS[ink], text, style, ink, "painted on a surface", lines)


def _sheet(job: Job, window: Window) -> _Writing:
    """Letters on a sheet of a random material."""
    material = job.pick(*SHEETS)
    ground = job.pick(*SHEETS[material])
    ink = readable_on(job.rng, COLOURS[ground])
    front = make_sheet(job.rng, material, COLOURS[ground], (window.width, window.height))
    text, style, lines = _write(job, front, COLOURS[ink], bold=None)
    kind = material if ground == "brown" else f"{ground} {material}"
    on = f"on a sheet of {kind}" if material == "paper" else f"on {with_article(kind)}"
    return _Writing(front, Image.new("L", front.size, 255), COLOURS[ground], text, style, ink, on, lines)


def _write(
    job: Job, image: Image.Image, colour: Colour | int, bold: bool | None
) -> tuple[str, Style, tuple[Line, ...]]:
    canvas = Canvas(job, image)
    width, height = image.size
    style = Style(
        job.typeface(bold=bold),
        int(height * job.between(0.16, 0.36)),
        _SMALLEST,
        job.pick("start", "centre", "centre"),
        job.between(1.0, 1.15),
    )
    text = job.phrase() if job.chance(0.4) else job.paragraph(job.pick(20, 40, 90))
    canvas.write(text, (0.07 * width, 0.07 * height, 0.93 * width, 0.93 * height), style, colour, "middle")
    return text, style, tuple(canvas.lines)


def _caption(job: Job, writing: _Writing, window: Window, size: tuple[int, int]) -> str:
    x, y = window.centre
    across = "left" if x < size[0] * 0.4 else "right" if x > size[0] * 0.6 else "middle"
    down = "upper" if y < size[1] * 0.4 else "lower" if y > size[1] * 0.6 else "central"
    alignment = describe_alignment(writing.style.align, job.script)
    return (
        f"A photograph with text {writing.on} in the {down} {across} of the picture, seen in perspective. The "
        f"{writing.style.typeface.style} letters in {writing.ink}, {alignment}, "
        f"in {job.writing}, read {quote(writing.text)}."
    )
