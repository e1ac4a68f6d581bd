"""Comics: panels in which a figure speaks in a balloon."""

from PIL import ImageDraw

from data_pipeline.synthesis.lettering.colours import COLOURS, choose, readable_on
from data_pipeline.synthesis.lettering.typesetting import Colour, Style
from data_pipeline.synthesis.text.job import Canvas, Job, Sample, quote

_NUMBERS = ("", "One panel", "Two panels", "Three panels", "Four panels")
_FIGURES = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown", "grey")
_BLACK = COLOURS["black"]


def draw_comic(job: Job) -> Sample:
    """Draws two to four panels in rows, in the reading direction of the script."""
    size = job.size(lambda size: 0.6 <= size.width / size.height <= 2)
    canvas = Canvas.plain(job, size, "white")
    unit, (width, height), rtl = canvas.unit, size, job.script.rtl
    per_row, rows = job.pick((2, 1), (1, 2), (2, 2)) if width < 1.5 * height else job.pick((2, 1), (3, 1))
    direction = "right to left" if rtl else "left to right"
    description = [
        f"A comic in {job.writing}. {_NUMBERS[per_row * rows]}, read from {direction} and from top to bottom."
    ]
    gap, margin, top = 16 * unit, 24 * unit, 24 * unit
    if job.chance(0.5):
        colour = readable_on(job.rng, COLOURS["white"])
        style = Style(
            job.typeface(bold=True, title=True), round(unit * job.between(40, 60)), round(unit * 26), "centre"
        )
        block = canvas.write(job.phrase(), (margin, top, width - margin, top + 0.14 * height), style, colour)
        top += block.extent + gap
        description.append(f"The title above them in {colour} reads {quote(block.text)}.")
    panel_width = (width - 2 * margin - gap * (per_row - 1)) / per_row
    panel_height = (height - top - margin - gap * (rows - 1)) / rows
    style = Style(job.typeface(), round(unit * job.between(44, 80)), round(unit * 17), "centre", 1.0)
    for number in range(per_row * rows):
        row, column = divmod(number, per_row)
        left = margin + (per_row - 1 - column if rtl else column) * (panel_width + gap)
        box = (
            left,
            top + row * (panel_height + gap),
            left + panel_width,
            top + row * (panel_height + gap) + panel_height,
        )
        description.append(_draw_panel(canvas, box, number + 1, style))
    return Sample(
        canvas.image,
        " ".join(description),
        tuple(canvas.texts),
        ("synthetic/text", "design/comic"),
        lines=tuple(canvas.lines),
    )


def _draw_panel(canvas: Canvas, box: tuple[float, float, float, float], number: int, style: Style) -> str:
    job, unit, draw = canvas.job, canvas.unit, ImageDraw.Draw(canvas.image)
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    ground = choose(job.rng, ("pale blue", "pale yellow", "pale green", "pale pink", "lavender", "light grey"))
    figure = choose(job.rng, _FIGURES)
    line = max(2, round(4 * unit))
    draw.rectangle(box, fill=COLOURS[ground], outline=_BLACK, width=line)
    x = left + width * job.between(0.3, 0.7)
    radius = min(width, height) * 0.11
    head = bottom - height * 0.27
    mood = _draw_figure(draw, job, x, head, radius, bottom, COLOURS[figure], line)
    inset = 0.06 * width
    text = job.phrase() if job.chance(0.3) else job.paragraph(45)
    balloon = (left + inset, top + 0.06 * height, right - inset, head - 1.7 * radius)
    draw.polygon(
        [(x - radius / 2, balloon[3] - line), (x + radius / 2, balloon[3] - line), (x, head - 1.15 * radius)],
        fill=COLOURS["white"],
        outline=_BLACK,
    )
    draw.rounded_rectangle(balloon, 0.16 * height, fill=COLOURS["white"], outline=_BLACK, width=line)
    pad_x, pad_y = 0.05 * width, 0.05 * height
    inner = (balloon[0] + pad_x, balloon[1] + pad_y, balloon[2] - pad_x, balloon[3] - pad_y)
    canvas.write(text, inner, style, "black", "middle")
    return f"In panel {number}, on {ground}, a {mood} {figure} figure says {quote(text)}."


def _draw_figure(
    draw: ImageDraw.ImageDraw,
    job: Job,
    x: float,
    head: float,
    radius: float,
    bottom: float,
    colour: Colour,
    line: int,
) -> str:
    """Draws a body with a face; returns its mood."""
    body = (x - 1.2 * radius, head + 0.8 * radius, x + 1.2 * radius, bottom + radius)
    draw.pieslice((body[0], body[1], body[2], 2 * bottom - body[1]), 180, 360, fill=colour, outline=_BLACK, width=line)
    draw.ellipse((x - radius, head - radius, x + radius, head + radius), fill=colour, outline=_BLACK, width=line)
    for side in (-1, 1):
        eye, size = x + side * 0.38 * radius, 0.12 * radius
        draw.ellipse((eye - size, head - 0.3 * radius - size, eye + size, head - 0.3 * radius + size), fill=_BLACK)
    mood = job.pick("smiling", "sad", "surprised")
    mouth = (x - 0.45 * radius, head, x + 0.45 * radius, head + 0.6 * radius)
    if mood == "smiling":
        draw.arc(mouth, 20, 160, fill=_BLACK, width=line)
    elif mood == "sad":
        draw.arc(
            (mouth[0], mouth[1] + 0.3 * radius, mouth[2], mouth[3] + 0.3 * radius), 200, 340, fill=_BLACK, width=line
        )
    else:
        draw.ellipse((x - 0.18 * radius, head + 0.15 * radius, x + 0.18 * radius, head + 0.6 * radius), fill=_BLACK)
    return mood
