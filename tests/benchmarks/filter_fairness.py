"""Shares of honest images that the filters drop, by class, beside the shares of spoilt ones that they must drop.

Honest classes are what filters for daylight photographs easily mistake: dark and high-key photographs, products on a
plain ground, shapes of equal luma, dithered and screened pages, line art, pages of text. Each has spoilt counterparts,
so a filter that drops nothing does not look good here. Thresholds are those of stage 4, the first that asks for
quality, without its minimal size and file sizes. The images come from scikit-image and are drawn here.

Run `python tests/benchmarks/filter_fairness.py` (two minutes on one core).
"""

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))  # behind PYTHONPATH, so that an older tree can be measured

from data_pipeline.filters.refusals import is_refusal
from data_pipeline.selection.thresholds import Thresholds
from experiments.qwen_image_2.base import CONTINUAL
from tests.data_pipeline import planted
from tests.data_pipeline.filters.refusal_texts import REFUSED, TRUTHFUL

STAGE = Thresholds(
    **CONTINUAL
    | dict(min_side=64, require=(), min_alignment_percentile=0.0, min_aesthetic=0.0, min_bits_per_pixel=0.0)
    | dict(drop_exact_duplicates=False, drop_near_duplicates=False)
)
PHOTOGRAPHS = (
    *("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png"),
    *("rocket.jpg", "ihc.png", "retina.jpg", "coins.png", "color.png", "brick.png", "grass.png", "gravel.png"),
)
TEXTURES = 11  # from here on, edges are everywhere and make no drawing
SIDE = 900
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) * 16 + 8


def photographs() -> list[Image.Image]:
    """Those of `PHOTOGRAPHS` that this version of scikit-image ships, cut to at most `SIDE` pixels a side."""
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    found = [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS if (folder / name).is_file()]
    return [image.crop((0, 0, min(SIDE, image.width), min(SIDE, image.height))) for image in found]


def exposed(image: Image.Image, stops: float) -> Image.Image:
    """The photograph with the light of `stops` more stops, in sRGB."""
    x = np.asarray(image) / 255
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) * 2.0**stops
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * levels.clip(0, 1)).round().astype(np.uint8))


def high_key(image: Image.Image) -> Image.Image:
    """A bright picture of little contrast."""
    return image.point([round(255 - (255 - level) * 0.35) for level in range(256)] * 3)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 180))


SHIRT = ((0.3, 0), (0.7, 0), (1, 0.3), (0.85, 0.4), (0.8, 0.3), (0.8, 1), (0.2, 1), (0.2, 0.3), (0.15, 0.4), (0, 0.3))
SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, int], object]] = {
    "plate": lambda draw, side: draw.ellipse((0, side * 0.1, side - 1, side * 0.9), fill=255),
    "bottle": lambda draw, side: (
        draw.rectangle((side * 0.4, 0, side * 0.6, side * 0.35), fill=255),
        draw.rounded_rectangle((side * 0.25, side * 0.3, side * 0.75, side - 1), side * 0.08, fill=255),
    ),
    "shirt": lambda draw, side: draw.polygon(
        [(side * x, side * y) for x, y in SHIRT],
        fill=255,
    ),
    "phone": lambda draw, side: draw.rounded_rectangle((side * 0.25, 0, side * 0.75, side - 1), side * 0.08, fill=255),
    "star": lambda draw, side: draw.regular_polygon((side / 2, side / 2, side / 2), 5, 10, fill=255),
}


def packshot(image: Image.Image, shape: str, ground: str) -> Image.Image:
    """A product with the photograph's surface on a plain ground."""
    product = ImageOps.fit(image, (600, 600))
    mask = Image.new("L", (1200, 1200))
    SHAPES[shape](ImageDraw.Draw(mask), 1200)
    page = Image.new("RGB", (800, 800), ground)
    page.paste(product, (100, 100), mask.resize((600, 600), Image.Resampling.LANCZOS))
    return page


def equal_luma(seed: int, size: int = 600) -> Image.Image:
    """Shapes in colours of luma 128, on a ground of it."""
    rng, image = np.random.default_rng(seed), Image.new("YCbCr", (size, size), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, r = (int(v) for v in rng.integers(size // 10, size // 2, 3))
        draw.ellipse((x, y, x + r, y + r // 2 + 20), fill=(128, *(int(v) for v in rng.integers(90, 166, 2))))
    return image.convert("RGB")


def ordered_dither(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L"))
    return Image.fromarray(
        np.where(grey > np.resize(BAYER, (4, 4))[np.ix_(*(np.arange(n) % 4 for n in grey.shape))], 255, 0).astype(
            np.uint8
        )
    )


def screened(image: Image.Image, pitch: float = 5.0) -> Image.Image:
    """As printed in a newspaper: round dots on a grid that is turned by 45 degrees."""
    grey = np.asarray(image.convert("L")) / 255
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]] * (np.pi * np.sqrt(2) / pitch)
    threshold = 0.5 + (np.cos(x + y) + np.cos(x - y)) / 4
    return Image.fromarray(np.where(grey > threshold, 255, 0).astype(np.uint8))


def twice(image: Image.Image) -> Image.Image:
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def comic(images: list[Image.Image], start: int) -> Image.Image:
    """A page of six dithered panels with black outlines."""
    page = Image.new("L", (1200, 1700), 255)
    for place in range(6):
        photograph = ImageOps.fit(images[(start + place) % len(images)], (270, 255)).convert("L")
        panel = twice(photograph.convert("1")).convert("L")
        ImageDraw.Draw(panel).rectangle((0, 0, 539, 509), outline=0, width=4)
        page.paste(panel, (40 + place % 2 * 580, 40 + place // 2 * 550))
    return page


def line_art(image: Image.Image) -> Image.Image:
    """Black lines on white where the photograph has its strongest edges."""
    edges = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(2)).filter(ImageFilter.FIND_EDGES))[
        2:-2, 2:-2
    ]
    return Image.fromarray(np.where(edges > np.quantile(edges, 0.93), 0, 255).astype(np.uint8))


def poster(seed: int) -> Image.Image:
    """Large shapes in few colours, as icons and flat illustrations have them."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (700, 500), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, r = (int(v) for v in rng.integers(40, 400, 3))
        draw.ellipse((x, y, x + r, y + r // 2 + 20), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def chroma_noise(seed: int) -> Image.Image:
    """Noise of colour alone, at equal luma."""
    rng = np.random.default_rng(seed)
    levels = np.full((400, 400, 3), 128, np.uint8)
    levels[..., 1:] = rng.normal(128, 18, (400, 400, 2)).clip(80, 176)
    return Image.fromarray(levels, "YCbCr").convert("RGB")


def dithered_noise(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    grey = Image.fromarray(rng.integers(60, 196, (400, 400), dtype=np.uint8))
    return twice(grey.convert("1")).convert("L") if seed % 2 else grey.convert("1").convert("L")


def letterboxed(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, (0, image.height // 6), "black")


def honest() -> Iterator[tuple[str, Image.Image]]:
    """(class, image) for images that should stay."""
    images = photographs()
    for number, image in enumerate(images):
        yield "daylight", image
        yield "dark, -3 EV", exposed(image, -3)
        yield "high-key", high_key(image)
        for place, shape in enumerate(SHAPES):
            if (place + number) % 2:
                yield f"product, {shape}", packshot(image, shape, "white")
        yield "product on grey", packshot(image, "plate", "#d8d8d8")
        yield "product on black", packshot(image, "shirt", "black")
        yield "dithered", twice(image.convert("1")).convert("L") if number % 2 else image.convert("1").convert("L")
        yield "dithered, ordered", ordered_dither(image)
        yield "screened print", screened(image)
        if number < TEXTURES:
            yield "line art", line_art(image)
    for number in range(12):
        yield "comic page, dithered", comic(images, number)
        yield "equal luma", equal_luma(number)
        yield "flat poster", poster(number)


def spoilt() -> Iterator[tuple[str, Image.Image]]:
    """(class, image) for images that must go."""
    for image in photographs():
        yield "blurred", blurred(image)
        yield "blurred, -3 EV", exposed(blurred(image), -3)
        yield "blurred, high-key", high_key(blurred(image))
        for colour in ("white", "black"):
            yield f"framed, {colour}", ImageOps.expand(image, max(image.size) // 8, colour)
        yield "letterboxed", letterboxed(image)
    for number in range(12):
        yield (
            "solid",
            Image.new("RGB", (400, 300), tuple(int(v) for v in np.random.default_rng(number).integers(0, 256, 3))),
        )
        yield "noise of colour", chroma_noise(number)
        yield "noise, dithered", dithered_noise(number)


def measure(images: Iterator[tuple[str, Image.Image]], **options) -> dict[str, tuple[int, int, Counter]]:
    """{class: (dropped, all, reasons)}; every second image is a JPEG file, unless its class is made of dots."""
    files, classes = [], {}
    for number, (name, image) in enumerate(images):
        dots = any(word in name for word in ("dither", "screen", "line art"))
        key = f"{number:04d}"
        classes[key] = name
        files.append((key, planted.bytes_of(image, **({"format": "PNG"} if dots or number % 2 else {"quality": 95}))))
    dropped = planted.select_files(files, STAGE).dropped
    found: dict[str, tuple[int, int, Counter]] = {}
    for key, name in classes.items():
        gone, count, reasons = found.get(name, (0, 0, Counter()))
        if key in dropped:
            reasons[dropped[key].reason] += 1
        found[name] = gone + (key in dropped), count + 1, reasons
    return found


def refusals() -> dict[str, tuple[float, float]]:
    """Precision and recall of the detection of refusals, by language, on `refusal_texts`; NaN without such texts."""
    figures = {}
    for language, refused in REFUSED.items():
        truthful = TRUTHFUL.get(language, ())
        found, wrong = (sum(map(is_refusal, texts)) for texts in (refused, truthful))
        figures[language] = found / (found + wrong) if found + wrong else math.nan, found / len(refused)
    return figures


def main() -> None:
    print("refusals: language, precision, recall, number of refusals and of captions like them")
    for language, (precision, recall) in refusals().items():
        count = f"{len(REFUSED[language])} {len(TRUTHFUL.get(language, ()))}"
        print(f"  {language} {precision:4.0%} {recall:4.0%} {count}")
    for title, images in (("honest images dropped", honest()), ("spoilt images dropped", spoilt())):
        found = measure(images)
        print(title)
        for name, (gone, count, reasons) in found.items():
            print(f"  {name:22s} {gone:3d} of {count:3d}  {dict(reasons) or ''}")
        print(
            f"  {'all':22s} {sum(x[0] for x in found.values()):3d} of {sum(x[1] for x in found.values()):3d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
