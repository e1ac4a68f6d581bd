"""Slides and posters."""

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageOps

from data_pipeline.synthesis.lettering.colours import COLOURS, MIN_CONTRAST_LARGE, choose, contrast, readable_on
from data_pipeline.synthesis.lettering.typesetting import Colour, Style
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, describe_alignment, join_parts, quote, with_article

_MARKS = ("round", "square", "diamond")


@dataclass
class _Page:
    """A page that is being drawn.

    Attributes:
      ground: name of the background colour.
      margin: distance of text from the sides, in pixels.
      description: sentences of the caption.
      licence: licence of the photograph on the page.
    """

    canvas: Canvas
    ground: str
    margin: float
    description: list[str] = field(default_factory=list)
    licence: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.canvas.image.size

    def ink(self) -> str:
        """The name of a random colour that is readable on the background."""
        return readable_on(self.canvas.job.rng, COLOURS[self.ground])

    def sample(self, kind: str) -> Sample:
        caption, texts = " ".join(self.description), tuple(self.canvas.texts)
        return Sample(
            self.canvas.image,
            caption,
            texts,
            ("synthetic/text", f"design/{kind}"),
            self.licence,
            tuple(self.canvas.lines),
        )


def draw_slide(job: Job) -> Sample:
    """Draws a wide page: a title with a bar or a line, points in one or two columns, perhaps an image and a footer."""
    size = job.size(lambda size: 4 / 3 - 0.1 <= size.width / size.height <= 2)
    ground = job.pick("white", "ivory", "light grey", "pale blue", "dark blue", "dark grey", "dark green", "black")
    page = _Page(Canvas.plain(job, size, ground), ground, size[0] * job.between(0.05, 0.09))
    unit, (width, height) = page.canvas.unit, size
    accent = readable_on(job.rng, COLOURS[ground], least=MIN_CONTRAST_LARGE)
    page.description.append(f"A presentation slide on {with_article(ground)} ground, in {job.writing}.")
    header = _slide_title(page, accent)
    foot = height * 0.9
    left, right = page.margin, width - page.margin
    if with_image := job.chance(0.35):
        scene = job.scene()
        page.licence = scene.licence
        share = (right - left) * 0.36
        at_left = job.chance(0.5)
        x = left if at_left else right - share
        _place_image(page.canvas, scene.image, (x, header + 40 * unit, x + share, foot - 10 * unit))
        left, right = (left + share + 30 * unit, right) if at_left else (left, right - share - 30 * unit)
        page.description.append(f"A photograph fills the {'left' if at_left else 'right'} side.")
    style = _slide_points(page, accent, (left, header + 40 * unit, right, foot), with_image)
    if job.chance(0.5):
        colour = page.ink()
        align = job.pick("start", "centre", "end")
        style = Style(style.typeface, round(unit * 20), round(unit * 16), align)
        box = (page.margin, foot, width - page.margin, height - 8 * unit)
        text = page.canvas.write(job.phrase(), box, style, colour, "middle").text
        page.description.append(
            f"The foot line, {describe_alignment(align, job.script)} in {colour}, reads {quote(text)}."
        )
    return page.sample("slide")


def _slide_title(page: _Page, accent: str) -> float:
    """Draws the title of a slide; returns the height of its header in pixels."""
    canvas, job, unit, (width, height) = page.canvas, page.canvas.job, page.canvas.unit, page.size
    draw = ImageDraw.Draw(canvas.image)
    header = height * job.between(0.15, 0.22)
    in_bar = job.chance(0.5)
    if in_bar:
        draw.rectangle((0, 0, width, header), fill=COLOURS[accent])
    else:
        draw.rectangle((page.margin, header, width - page.margin, header + 4 * unit), fill=COLOURS[accent])
    behind = accent if in_bar else page.ground
    colour, align = readable_on(job.rng, COLOURS[behind]), job.pick("start", "centre")
    style = Style(job.typeface(bold=True, title=True), round(unit * job.between(48, 68)), round(unit * 24), align)
    box = (page.margin, 0.1 * header, width - page.margin, 0.95 * header)
    title = canvas.write(job.phrase(), box, style, colour, "middle").text
    where = f"in {with_article(accent)} bar at the top" if in_bar else f"at the top above {with_article(accent)} line"
    page.description.append(
        f"The title {where}, {describe_alignment(align, job.script)} in {colour}, reads {quote(title)}."
    )
    return header


def _slide_points(page: _Page, accent: str, box: tuple[float, float, float, float], with_image: bool) -> Style:
    """Draws the points of a slide into a box, in one column next to an image; returns their style."""
    canvas, job, unit, rtl = page.canvas, page.canvas.job, page.canvas.unit, page.canvas.job.script.rtl
    draw = ImageDraw.Draw(canvas.image)
    left, top, right, bottom = box
    colour, mark = page.ink(), job.pick(*_MARKS)
    columns = 1 if with_image else job.pick(1, 1, 2)
    count = columns * int(job.rng.integers(2, 4 if columns == 2 else 6))
    row = (bottom - top) / (count // columns)
    wished = min(max(row * job.between(0.25, 0.5), 28 * unit), 60 * unit)
    style = Style(job.typeface(bold=False), round(wished), round(unit * 19))
    column = (right - left) / columns
    points = []
    for number in range(count):
        place, line = divmod(number, count // columns)
        x = left + (columns - 1 - place if rtl else place) * column
        y = top + line * row
        indent, radius = 46 * unit, 8 * unit
        start, end = (x, x + column - indent) if rtl else (x + indent, x + column - 12 * unit)
        text = job.paragraph(50) if job.chance(0.6) else job.phrase()
        block = canvas.write(text, (start, y, end, y + row - 8 * unit), style, colour)
        centre = x + column - indent / 2 if rtl else x + indent / 2
        _draw_mark(draw, mark, centre, y + block.pitch / 2, radius, COLOURS[accent])
        points.append(quote(text))
    in_columns = " in two columns" if columns == 2 else ""
    page.description.append(
        f"Below it, {count} points{in_columns} with {mark} {accent} marks, in {colour}: {join_parts(points)}."
    )
    return style


def draw_poster(job: Job) -> Sample:
    """Draws a tall page: a large title, an image or shapes, a line below, and details at the bottom."""
    size = job.size(lambda size: 0.5 <= size.width / size.height <= 1)
    ground = choose(job.rng)
    page = _Page(Canvas.plain(job, size, ground), ground, size[0] * job.between(0.06, 0.1))
    canvas, unit, (width, height), margin = page.canvas, page.canvas.unit, size, page.margin
    align = job.pick("start", "centre", "centre")
    page.description.append(
        f"A poster on {with_article(ground)} ground, its text {describe_alignment(align, job.script)} in {job.writing}."
    )
    if job.chance(0.7):
        _poster_title(page, align, 0.05 * height, 0.28 * height)
        _poster_image(page, "In the middle", 0.3 * height, 0.66 * height)
        rest = 0.68 * height
    else:
        _poster_image(page, "At the top", 0.0, 0.42 * height)
        _poster_title(page, align, 0.44 * height, 0.64 * height)
        rest = 0.65 * height
    colour = page.ink()
    style = Style(job.typeface(bold=True), round(unit * job.between(40, 56)), round(unit * 24), align)
    box = (margin, rest, width - margin, rest + 0.09 * height)
    text = canvas.write(job.phrase(), box, style, colour, "middle").text
    page.description.append(f"Below it stands {quote(text)} in {colour}.")
    style = Style(job.typeface(bold=False), round(unit * job.between(26, 36)), round(unit * 17), align, 1.1)
    text = job.paragraph(120)
    canvas.write(text, (margin, rest + 0.1 * height, width - margin, 0.95 * height), style, colour)
    page.description.append(f"Smaller type in {colour} at the foot reads {quote(text)}.")
    return page.sample("poster")


def _poster_title(page: _Page, align: str, top: float, bottom: float) -> None:
    canvas, job, unit = page.canvas, page.canvas.job, page.canvas.unit
    colour = page.ink()
    style = Style(job.typeface(bold=True, title=True), round(unit * job.between(80, 130)), round(unit * 36), align)
    box = (page.margin, top, page.size[0] - page.margin, bottom)
    text = canvas.write(job.phrase(), box, style, colour, "middle").text
    page.description.append(f"The large title in {colour} reads {quote(text)}.")


def _poster_image(page: _Page, where: str, top: float, bottom: float) -> None:
    """Draws a photograph, or shapes in random colours."""
    canvas, job, (width, height) = page.canvas, page.canvas.job, page.size
    if job.chance(0.6):
        scene = job.scene()
        page.licence = scene.licence
        inset = page.margin if job.chance(0.5) else 0.0
        _place_image(canvas, scene.image, (inset, top, width - inset, bottom))
        page.description.append(f"{where} is a photograph.")
        return
    draw = ImageDraw.Draw(canvas.image)
    shapes = []
    for number in range(int(job.rng.integers(2, 5))):
        names = tuple(name for name, rgb in COLOURS.items() if contrast(rgb, COLOURS[page.ground]) > 1.5)
        colour, radius = choose(job.rng, names), job.between(0.06, 0.15) * height
        x = width * (number + 1) / 5
        y = job.between(top + radius, bottom - radius)
        kind = job.pick("circle", "square")
        shape = (x - radius, max(y - radius, top), x + radius, min(y + radius, bottom))
        (draw.ellipse if kind == "circle" else draw.rectangle)(shape, fill=COLOURS[colour])
        shapes.append(f"{with_article(colour)} {kind}")
    page.description.append(f"{where} are {join_parts(shapes)}.")


def _place_image(canvas: Canvas, image: Image.Image, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = (round(value) for value in box)
    canvas.image.paste(ImageOps.fit(image, (right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))


def _draw_mark(draw: ImageDraw.ImageDraw, mark: str, x: float, y: float, radius: float, colour: Colour) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if mark == "round":
        draw.ellipse(box, fill=colour)
    elif mark == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=colour)
