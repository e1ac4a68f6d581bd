"""Slides and posters."""

from PIL import Image, ImageDraw, ImageOps

from data_pipeline.synthesis.lettering.colours import COLOURS, READABLE_LARGE, choose, contrast, readable_on
from data_pipeline.synthesis.lettering.typesetting import Style
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, aligned, listing, quote, with_article

_MARKS = ("round", "square", "diamond")


def draw_slide(job: Job) -> Sample:
    """A wide page: a title with a bar or a line, points in one or two columns, perhaps a picture and a foot line."""
    size = job.size(lambda size: 4 / 3 - 0.1 <= size.width / size.height <= 2)
    ground = job.pick("white", "ivory", "light grey", "pale blue", "dark blue", "dark grey", "dark green", "black")
    canvas = Canvas.plain(job, size, ground)
    unit, (width, height), margin = canvas.unit, size, size[0] * job.between(0.05, 0.09)
    draw, rtl = ImageDraw.Draw(canvas.image), job.script.rtl
    accent = readable_on(job.rng, COLOURS[ground], least=READABLE_LARGE)
    said = [f"A presentation slide on {with_article(ground)} ground, in {job.writing}."]

    header = height * job.between(0.15, 0.22)
    in_bar = job.chance(0.5)
    title_ground = accent if in_bar else ground
    if in_bar:
        draw.rectangle((0, 0, width, header), fill=COLOURS[accent])
    else:
        draw.rectangle((margin, header, width - margin, header + 4 * unit), fill=COLOURS[accent])
    colour, align = readable_on(job.rng, COLOURS[title_ground]), job.pick("start", "centre")
    style = Style(job.typeface(bold=True, title=True), round(unit * job.between(48, 68)), round(unit * 24), align)
    box = (margin, 0.1 * header, width - margin, 0.95 * header)
    title = canvas.write(job.phrase(), box, style, colour, "middle").text
    where = f"in {with_article(accent)} bar at the top" if in_bar else f"at the top above {with_article(accent)} line"
    said.append(f"The title {where}, {aligned(align, job.script)} in {colour}, reads {quote(title)}.")

    foot = height * 0.9
    left, right = margin, width - margin
    if with_picture := job.chance(0.35):
        scene = job.scene()
        share = (right - left) * 0.36
        at_left = job.chance(0.5)
        x = left if at_left else right - share
        _place_picture(canvas, scene.image, (x, header + 40 * unit, x + share, foot - 10 * unit))
        left, right = (left + share + 30 * unit, right) if at_left else (left, right - share - 30 * unit)
        said.append(f"A photograph fills the {'left' if at_left else 'right'} side.")
    colour, mark = readable_on(job.rng, COLOURS[ground]), job.pick(*_MARKS)
    columns = 1 if with_picture else job.pick(1, 1, 2)
    count = columns * int(job.rng.integers(2, 4 if columns == 2 else 6))
    row = (foot - header - 40 * unit) / (count // columns)
    wished = min(max(row * job.between(0.25, 0.5), 28 * unit), 60 * unit)
    style = Style(job.typeface(bold=False), round(wished), round(unit * 19))
    column = (right - left) / columns
    points = []
    for number in range(count):
        place, line = divmod(number, count // columns)
        x = left + (columns - 1 - place if rtl else place) * column
        y = header + 40 * unit + line * row
        indent, radius = 46 * unit, 8 * unit
        start, end = (x, x + column - indent) if rtl else (x + indent, x + column - 12 * unit)
        text = job.paragraph(50) if job.chance(0.6) else job.phrase()
        block = canvas.write(text, (start, y, end, y + row - 8 * unit), style, colour)
        centre = x + column - indent / 2 if rtl else x + indent / 2
        _draw_mark(draw, mark, centre, y + block.pitch / 2, radius, COLOURS[accent])
        points.append(quote(text))
    in_columns = " in two columns" if columns == 2 else ""
    said.append(f"Below it, {count} points{in_columns} with {mark} {accent} marks, in {colour}: {listing(points)}.")
    if job.chance(0.5):
        colour = readable_on(job.rng, COLOURS[ground])
        align = job.pick("start", "centre", "end")
        style = Style(style.typeface, round(unit * 20), round(unit * 16), align)
        text = canvas.write(
            job.phrase(), (margin, foot, width - margin, height - 8 * unit), style, colour, "middle"
        ).text
        said.append(f"The foot line, {aligned(align, job.script)} in {colour}, reads {quote(text)}.")
    return Sample(
        canvas.image,
        " ".join(said),
        tuple(canvas.texts),
        ("synthetic/text", "design/slide"),
        scene.licence if with_picture else None,
    )


def draw_poster(job: Job) -> Sample:
    """A tall page: a large title, a picture or shapes, a line below and details at the foot."""
    size = job.size(lambda size: 0.5 <= size.width / size.height <= 1)
    ground = choose(job.rng)
    canvas = Canvas.plain(job, size, ground)
    unit, (width, height), margin = canvas.unit, size, size[0] * job.between(0.06, 0.1)
    align = job.pick("start", "centre", "centre")
    said = [f"A poster on {with_article(ground)} ground, its text {aligned(align, job.script)} in {job.writing}."]
    title_at_top = job.chance(0.7)
    picture_top, picture_bottom = (0.3 * height, 0.66 * height) if title_at_top else (0.0, 0.42 * height)
    licence = None

    def picture() -> None:
        nonlocal licence
        where = "In the middle" if title_at_top else "At the top"
        if job.chance(0.6):
            scene = job.scene()
            licence = scene.licence
            inset = margin if job.chance(0.5) else 0.0
            _place_picture(canvas, scene.image, (inset, picture_top, width - inset, picture_bottom))
            said.append(f"{where} is a photograph.")
            return
        draw = ImageDraw.Draw(canvas.image)
        shapes = []
        for number in range(int(job.rng.integers(2, 5))):
            names = tuple(name for name, rgb in COLOURS.items() if contrast(rgb, COLOURS[ground]) > 1.5)
            colour, radius = choose(job.rng, names), job.between(0.06, 0.15) * height
            x = width * (number + 1) / 5
            y = job.between(picture_top + radius, picture_bottom - radius)
            kind = job.pick("circle", "square")
            shape = (x - radius, max(y - radius, picture_top), x + radius, min(y + radius, picture_bottom))
            (draw.ellipse if kind == "circle" else draw.rectangle)(shape, fill=COLOURS[colour])
            shapes.append(f"{with_article(colour)} {kind}")
        said.append(f"{where} are {listing(shapes)}.")

    def title(top: float, bottom: float) -> None:
        colour = readable_on(job.rng, COLOURS[ground])
        style = Style(job.typeface(bold=True, title=True), round(unit * job.between(80, 130)), round(unit * 36), align)
        text = canvas.write(job.phrase(), (margin, top, width - margin, bottom), style, colour, "middle").text
        said.append(f"The large title in {colour} reads {quote(text)}.")

    if title_at_top:
        title(0.05 * height, 0.28 * height)
        picture()
        rest = 0.68 * height
    else:
        picture()
        title(0.44 * height, 0.64 * height)
        rest = 0.65 * height
    colour = readable_on(job.rng, COLOURS[ground])
    style = Style(job.typeface(bold=True), round(unit * job.between(40, 56)), round(unit * 24), align)
    text = canvas.write(
        job.phrase(), (margin, rest, width - margin, rest + 0.09 * height), style, colour, "middle"
    ).text
    said.append(f"Below it stands {quote(text)} in {colour}.")
    style = Style(job.typeface(bold=False), round(unit * job.between(26, 36)), round(unit * 17), align, 1.1)
    text = job.paragraph(120)
    canvas.write(text, (margin, rest + 0.1 * height, width - margin, 0.95 * height), style, colour)
    said.append(f"Smaller type in {colour} at the foot reads {quote(text)}.")
    tags = ("synthetic/text", "design/poster")
    return Sample(canvas.image, " ".join(said), tuple(canvas.texts), tags, licence)


def _place_picture(canvas: Canvas, picture: Image.Image, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = (round(value) for value in box)
    canvas.image.paste(ImageOps.fit(picture, (right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))


def _draw_mark(draw: ImageDraw.ImageDraw, mark: str, x: float, y: float, radius: float, colour) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if mark == "round":
        draw.ellipse(box, fill=colour)
    elif mark == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=colour)
