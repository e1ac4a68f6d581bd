"""Edits of text: words on a sign or directly on the image are changed, written, or removed."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.synthesis.edits.compositing import Placement
from data_pipeline.synthesis.edits.cutouts import Unsuitable
from data_pipeline.synthesis.edits.edit import Edit, Ingredients, describe_position
from data_pipeline.synthesis.edits.wordings import instructions
from data_pipeline.synthesis.lettering.fonts import FontFile, at_size

SUPERSAMPLING = 3  # gives smooth edges at any angle
MIN_GLYPH = 14  # smallest legible font size in pixels

ENGLISH = (
    "OPEN",
    "CLOSED",
    "Welcome",
    "Good morning",
    "Good night",
    "Coffee 2.50",
    "Coffee 3.20",
    "Fresh bread",
    "Fresh fish",
    "Garden café",
    "Bakery",
    "Bookshop",
    "Summer sale",
    "Winter sale",
    "50% off",
    "70% off",
    "Room 204",
    "Room 317",
    "Exit",
    "Entrance",
    "Platform 3",
    "Platform 9",
    "No parking",
    "Parking",
    "Quiet please",
    "Happy birthday",
    "Merry Christmas",
    "Happy New Year",
    "Live music tonight",
    "Farmers market",
    "City library",
    "Art museum",
    "Tickets here",
    "Sold out",
    "Back at 14:30",
    "Back at 16:00",
    "Wet paint",
    "Beach 400 m",
    "Lake 1.2 km",
    "Thank you",
)
CHINESE = (
    "营业中",
    "休息",
    "欢迎光临",
    "早上好",
    "晚安",
    "咖啡 25元",
    "咖啡 32元",
    "新鲜面包",
    "今日特价",
    "五折优惠",
    "七折优惠",
    "书店",
    "花店",
    "图书馆",
    "博物馆",
    "出口",
    "入口",
    "三号站台",
    "九号站台",
    "禁止停车",
    "停车场",
    "请勿打扰",
    "生日快乐",
    "新年快乐",
    "春节快乐",
    "谢谢惠顾",
    "售票处",
    "已售罄",
    "海滩 400米",
    "湖边茶馆",
)


@dataclass(frozen=True)
class Style:
    """The style of words before and after the edit.

    Attributes:
      font: font of the words.
      ground: colour of the sign behind the words; None for outlined words directly on the image.
      ink: colour of the words.
      angle: rotation in degrees.
      candidates: words that must fit on the sign, so that its size does not change with the words.
    """

    font: FontFile
    ground: tuple[int, int, int] | None
    ink: tuple[int, int, int]
    angle: float
    candidates: tuple[str, ...]


def text(ingredients: Ingredients, rng: np.random.Generator) -> Edit:
    """An image whose words are changed, added or removed."""
    form = ("change", "change", "change", "add", "remove")[int(rng.integers(5))]
    scene = ingredients.scene(rng)
    script, words = (("Latn", ENGLISH), ("Hans", CHINESE))[int(rng.integers(2))]
    before, after = (words[int(place)] for place in rng.choice(len(words), 2, replace=False))
    shown = {"change": (before, after), "add": (after,), "remove": (before,)}[form]
    faces = ingredients.fonts.typefaces[script] if ingredients.fonts else ()
    style = _style(rng, faces[int(rng.integers(len(faces)))].files[0], shown)
    spot, size = _fit(rng, scene.image.size, style)
    style = style if style.ground else _legible(style, scene.image.crop(spot.box))
    images = [_write(scene.image, one, style, spot, size) for one in shown]
    plain = scene.stored or scene.image
    ends: dict[str, list[Image.Image | bytes]] = {
        "change": [*images],
        "add": [plain, *images],
        "remove": [*images, plain],
    }
    source, target = ends[form]
    at = describe_position(spot, scene.image.size)
    fields = {"before": before, "after": after}
    wordings = instructions(f"text/{form}", rng, fields | {"where": at[0]}, fields | {"where": at[1]})
    return Edit((source,), target, wordings, ("edit/local", "edit/text", f"edit/text/{form}"), (scene,))


def _style(rng: np.random.Generator, font: FontFile, shown: tuple[str, ...]) -> Style:
    angle = float(rng.choice([0.0, rng.uniform(-8, 8)]))
    if rng.random() < 0.4:
        return Style(font, None, (255, 255, 255), angle, shown)
    base = rng.integers(0, 256, 3)
    light = bool(rng.random() < 0.5)
    ground = tuple(int(c) for c in (210 + base * 45 // 255 if light else base * 110 // 255))
    ink = tuple(int(c) for c in (base[::-1] * 70 // 255 if light else 225 + base[::-1] * 30 // 255))
    return Style(font, ground, ink, angle, shown)  # type: ignore[arg-type]


def _legible(style: Style, under: Image.Image) -> Style:
    dark = float(np.asarray(under.convert("L")).mean()) < 128
    return replace(style, ink=(255, 255, 255) if dark else (16, 16, 16))


def _fit(rng: np.random.Generator, size: tuple[int, int], style: Style) -> tuple[Placement, float]:
    """A placement of the words completely inside the image, and the font size."""
    width, height = size
    glyph = float(rng.uniform(0.06, 0.13)) * min(size)
    for _ in range(12):
        drawn = _layer(style.candidates[0], style, glyph).size
        if drawn[0] <= 0.85 * width and drawn[1] <= 0.6 * height:
            break
        glyph *= 0.85
    if glyph < MIN_GLYPH or drawn[0] > 0.85 * width:
        raise Unsuitable("words_do_not_fit")
    left, top = (round(rng.uniform(0.04, 0.96) * (whole - part)) for whole, part in zip(size, drawn, strict=True))
    return Placement(*drawn, left, top, 0.0), glyph


def _write(scene: Image.Image, words: str, style: Style, spot: Placement, glyph: float) -> Image.Image:
    layer = _layer(words, style, glyph)
    whole = Image.new("RGBA", scene.size)
    whole.paste(layer, (spot.left, spot.top))
    return Image.alpha_composite(scene.convert("RGBA"), whole).convert("RGB")


def _layer(words: str, style: Style, glyph: float) -> Image.Image:
    """Words on their sign, rotated, as RGBA."""
    font = at_size(style.font, round(glyph * SUPERSAMPLING))
    outline = 0 if style.ground else max(1, round(glyph * SUPERSAMPLING / 14))
    margin = round(0.45 * glyph * SUPERSAMPLING) if style.ground else SUPERSAMPLING
    boxes = [font.getbbox(one, stroke_width=outline, anchor="mm") for one in style.candidates]
    width = round(max(right - left for left, _, right, _ in boxes)) + 2 * margin
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    height = round(bottom - top) + 2 * margin
    layer = Image.new("RGBA", (width, height), (*(style.ground or style.ink), 0))
    draw = ImageDraw.Draw(layer)
    if style.ground:
        draw.rounded_rectangle((0, 0, width - 1, height - 1), margin // 2, fill=(*style.ground, 255))
    against = (0, 0, 0) if sum(style.ink) > 382 else (255, 255, 255)
    draw.text(
        (width / 2, margin - top),
        words,
        anchor="mm",
        fill=(*style.ink, 255),
        font=font,
        stroke_width=outline,
        stroke_fill=(*against, 255),
    )
    turned = layer.convert("RGBa").rotate(style.angle, Image.Resampling.BICUBIC, expand=True)
    size = max(1, round(turned.width / SUPERSAMPLING)), max(1, round(turned.height / SUPERSAMPLING))
    return turned.resize(size, Image.Resampling.BOX).convert("RGBA")
