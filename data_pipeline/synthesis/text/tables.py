"""Tables and infographics: names with numbers."""

from PIL import ImageDraw

from data_pipeline.synthesis.lettering.colours import COLOURS, MIN_CONTRAST_LARGE, choose, readable_on
from data_pipeline.synthesis.lettering.typesetting import Style
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, describe_alignment, join_parts, quote, with_article

_GROUNDS = ("white", "ivory", "light grey", "pale blue", "pale green", "pale yellow", "lavender", "dark blue", "black")


def draw_table(job: Job) -> Sample:
    """Draws a title and a table: a header row, then rows of a name and numbers, in the direction of the script."""
    size = job.size(lambda size: 0.7 <= size.width / size.height <= 2)
    ground = job.pick(*_GROUNDS)
    canvas = Canvas.plain(job, size, ground)
    unit, (width, height), draw = canvas.unit, size, ImageDraw.Draw(canvas.image)
    margin = width * job.between(0.05, 0.09)
    description = [f"A table on {with_article(ground)} ground, in {job.writing}."]
    top = margin
    if job.chance(0.7):
        colour, align = readable_on(job.rng, COLOURS[ground]), job.pick("start", "centre")
        style = Style(job.typeface(bold=True, title=True), round(unit * job.between(44, 60)), round(unit * 26), align)
        block = canvas.write(job.phrase(), (margin, top, width - margin, top + 0.16 * height), style, colour)
        top += block.extent + 20 * unit
        description.append(
            f"The title above, {describe_alignment(align, job.script)} in {colour}, reads {quote(block.text)}."
        )

    columns, rows = int(job.rng.integers(2, 5)), int(job.rng.integers(3, 8))
    head = readable_on(job.rng, COLOURS[ground], least=MIN_CONTRAST_LARGE)
    line, ink, head_ink = choose(job.rng), readable_on(job.rng, COLOURS[ground]), readable_on(job.rng, COLOURS[head])
    row = min((height - margin - top) / (rows + 1), 110 * unit)
    first = 0.34 if columns > 2 else 0.55
    widths = [first * (width - 2 * margin)] + [(1 - first) * (width - 2 * margin) / (columns - 1)] * (columns - 1)
    draw.rectangle((margin, top, width - margin, top + row), fill=COLOURS[head])
    wished = round(min(max(row * job.between(0.3, 0.5), 24 * unit), 44 * unit))
    style = Style(job.typeface(bold=False), wished, round(unit * 15))
    head_style = Style(job.typeface(bold=True, style=style.typeface.style), wished, round(unit * 15))
    for number in range(rows + 1):
        y, cells, x = top + number * row, [], margin
        for column in range(columns):
            text = job.phrase() if column == 0 or number == 0 else _number(job)
            left = width - x - widths[column] if job.script.rtl else x
            box = (left + 10 * unit, y + 2, left + widths[column] - 10 * unit, y + row - 2)
            canvas.write(text, box, head_style if number == 0 else style, head_ink if number == 0 else ink, "middle")
            x += widths[column]
            cells.append(quote(text))
        draw.line((margin, y + row, width - margin, y + row), fill=COLOURS[line], width=max(1, round(2 * unit)))
        if number == 0:
            direction = "right to left" if job.script.rtl else "left to right"
            description.append(
                f"The {head} head row in {head_ink}, from {direction}: {join_parts(cells)}. The rows in {ink}:"
            )
        else:
            description.append(f"{join_parts(cells)}{'.' if number == rows else ';'}")
    return Sample(
        canvas.image,
        " ".join(description),
        tuple(canvas.texts),
        ("synthetic/text", "design/table"),
        lines=tuple(canvas.lines),
    )


def draw_infographic(job: Job) -> Sample:
    """Draws a title, then bars or large numbers with labels, and a note below."""
    size = job.size(lambda size: 0.5 <= size.width / size.height <= 1.4)
    ground = job.pick(*_GROUNDS)
    canvas = Canvas.plain(job, size, ground)
    unit, (width, height), draw = canvas.unit, size, ImageDraw.Draw(canvas.image)
    margin, rtl = width * 0.07, job.script.rtl
    colour = readable_on(job.rng, COLOURS[ground])
    style = Style(job.typeface(bold=True, title=True), round(unit * job.between(54, 76)), round(unit * 30), "centre")
    title = canvas.write(
        job.phrase(), (margin, margin / 2, width - margin, 0.16 * height), style, colour, "middle"
    ).text
    kind = job.pick("bars", "circles")
    description = [
        f"An infographic on {with_article(ground)} ground, in {job.writing}.",
        f"The title, centred in {colour}, reads {quote(title)}.",
    ]
    count = int(job.rng.integers(3, 6))
    row = 0.66 * height / count
    label = Style(job.typeface(bold=False), round(unit * 34), round(unit * 17))
    parts = []
    for number in range(count):
        y = 0.18 * height + number * row
        value, fill = int(job.rng.integers(5, 100)), readable_on(job.rng, COLOURS[ground], least=MIN_CONTRAST_LARGE)
        text, figure = job.phrase(), f"{value}%"
        if kind == "bars":
            canvas.write(text, (margin, y, width - margin, y + 0.5 * row), label, colour, "bottom")
            full = (width - 2 * margin) * 0.8
            start = width - margin - full * value / 100 if rtl else margin
            draw.rectangle((start, y + 0.54 * row, start + full * value / 100, y + 0.88 * row), fill=COLOURS[fill])
            box = (
                (start - 130 * unit, start - 12 * unit) if rtl else (start + full * value / 100 + 12 * unit, width - 2)
            )
            at_bar = Style(job.typeface(bold=True), round(unit * 34), round(unit * 16))
            canvas.write(figure, (box[0], y + 0.54 * row, box[1], y + 0.88 * row), at_bar, colour, "middle")
            parts.append(f"{quote(text)} with {with_article(fill)} bar and {quote(figure)}")
        else:
            radius = min(0.44 * row, 75 * unit)
            x = width - margin - radius if rtl else margin + radius
            draw.ellipse((x - radius, y + row / 2 - radius, x + radius, y + row / 2 + radius), fill=COLOURS[fill])
            inside = Style(job.typeface(bold=True), round(radius * 0.7), round(unit * 16), "centre")
            ink = readable_on(job.rng, COLOURS[fill])
            canvas.write(figure, (x - radius, y, x + radius, y + row), inside, ink, "middle")
            box = (margin, x - radius - 24 * unit) if rtl else (x + radius + 24 * unit, width - margin)
            canvas.write(text, (box[0], y, box[1], y + row), label, colour, "middle")
            parts.append(f"{with_article(fill)} circle with {quote(figure)} in {ink} beside {quote(text)}")
    description.append(f"From top to bottom: {'; '.join(parts)}.")
    if job.chance(0.6):
        note = Style(job.typeface(bold=False), round(unit * 26), round(unit * 16), "centre")
        text = job.paragraph(60)
        canvas.write(text, (margin, 0.86 * height, width - margin, 0.98 * height), note, colour, "middle")
        description.append(f"A note at the foot in {colour} reads {quote(text)}.")
    return Sample(
        canvas.image,
        " ".join(description),
        tuple(canvas.texts),
        ("synthetic/text", "design/infographic"),
        lines=tuple(canvas.lines),
    )


def _number(job: Job) -> str:
    """A random number in a common notation."""
    value = int(job.rng.integers(1, 1000))
    return job.pick(f"{value}", f"{value}.{int(job.rng.integers(10))}", f"{value % 100}%")
