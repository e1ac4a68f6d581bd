"""Real images for tests and benchmarks: photographs of Debian and Python packages, stamps with their captions."""

import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from tests.debian import require_debian

BACKGROUNDS = Path("/usr/share/backgrounds/mate")
STAMPS = Path("/usr/share/tuxpaint/stamps")
_TRANSLATION = re.compile(r"([a-z]{2,3})(?:_([A-Z]{2}))?(?:@\w+)?\.utf8=(.*\S)")


def photographs(tiles: int, side: int) -> Iterator[Image.Image]:
    """Distinct RGB photographs: `tiles` x `tiles` parts, which do not overlap, of two dozen large ones.

    Args:
      side: pixels of the longer side of each.
    """
    require_debian("mate-backgrounds", BACKGROUNDS)
    packaged = {"skimage": "data", "sklearn": "datasets/images"}
    inside = [Path(importlib.util.find_spec(name).origin).parent / where for name, where in packaged.items()]
    names = (
        "astronaut.png",
        "coffee.png",
        "chelsea.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "china.jpg",
        "flower.jpg",
    )
    paths = [*sorted((BACKGROUNDS / "nature").glob("*.jpg")), BACKGROUNDS / "abstract/Elephants.jpg"]
    paths += [folder / name for folder in inside for name in names if (folder / name).is_file()]
    assert len(paths) == 13 + len(names)
    for path in paths:
        whole = Image.open(path).convert("RGB")
        width, height = whole.width // tiles, whole.height // tiles
        for index in range(tiles**2):
            left, top = index % tiles * width, index // tiles * height
            part = whole.crop((left, top, left + width, top + height))
            factor = side / max(part.size)
            yield part.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)


def watermark(image: Image.Image, kind: str = "middle", opacity: float = 0.5, text: str = "SAMPLE") -> Image.Image:
    """The image under translucent white text: large in the `middle`, `tiled` all over it, or small in a `corner`."""
    layer = Image.new("L", image.size, 0)
    size = {"middle": max(image.size) // 8, "tiled": max(image.size) // 22, "corner": max(image.size) // 25}[kind]
    draw, font, level = ImageDraw.Draw(layer), ImageFont.load_default(size), round(255 * opacity)
    if kind == "middle":
        draw.text((image.width / 2, image.height / 2), text, level, font, anchor="mm")
    elif kind == "corner":
        draw.text((image.width - size // 2, image.height - size // 2), text, level, font, anchor="rd")
    else:
        step = round(draw.textlength(text, font) * 1.6), 4 * size
        for row, y in enumerate(range(-size, image.height, step[1])):
            for x in range(-step[0] + row % 2 * step[0] // 2, image.width, step[0]):
                draw.text((x, y), text, level, font)
    marked = image.copy()
    marked.paste("white", mask=layer)
    return marked


def bytes_of(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 92} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def crop(image: Image.Image, share: float) -> Image.Image:
    """The image without `share` of its width and height, half of it on each side."""
    width, height = (round(side * share / 2) for side in image.size)
    return image.crop((width, height, image.width - width, image.height - height))


def burst(image: Image.Image, seed: int = 0) -> Image.Image:
    """The next frame of a burst: shifted by up to 2 %, turned by up to half a degree, a little brighter, noisy."""
    rng = np.random.default_rng(seed)
    turned = image.rotate(float(rng.uniform(-0.5, 0.5)), Image.Resampling.BICUBIC)
    (left, top), (width, height) = rng.uniform(0.01, 0.05, 2), image.size
    frame = turned.crop(
        (round(left * width), round(top * height), round((left + 0.94) * width), round((top + 0.94) * height))
    )
    levels = np.asarray(frame) * rng.uniform(0.95, 1.05) + rng.normal(0, 3, (frame.height, frame.width, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


# What is planted as near duplicates: name -> the file of a copy.
COPIES = {
    "JPEG quality 30": lambda image: bytes_of(image, quality=30),
    "half size": lambda image: bytes_of(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)),
    "brightness x 1.3": lambda image: bytes_of(ImageEnhance.Brightness(image).enhance(1.3)),
    "watermark": lambda image: bytes_of(watermark(image)),
    "crop of 2 %": lambda image: bytes_of(crop(image, 0.02), quality=85),
    "crop of 5 %": lambda image: bytes_of(crop(image, 0.05), quality=85),
    "crop of 10 %": lambda image: bytes_of(crop(image, 0.1), quality=85),
    "burst": lambda image: bytes_of(burst(image, image.width + image.getpixel((9, 9))[0])),
}


def write_backgrounds(folder: Path) -> int:
    """Copies the background images with a `metadata.jsonl`; returns their number."""
    require_debian("mate-backgrounds", BACKGROUNDS)
    paths = sorted(path for path in BACKGROUNDS.rglob("*") if path.suffix in (".jpg", ".png"))
    captions = [[{"text": f"A desktop background named {path.stem}.", "language": "en"}] for path in paths]
    return _write(folder, paths, BACKGROUNDS, captions)


def write_stamps(folder: Path, kinds: tuple[str, ...]) -> int:
    """Copies the stamps of some kinds (`animals`, ..) with their captions in all languages; returns their number."""
    require_debian("tuxpaint-stamps-default", STAMPS)
    paths, captions = [], []
    for path in sorted(path for kind in kinds for path in (STAMPS / kind).rglob("*.png")):
        if path.with_suffix(".txt").is_file():
            first, *rest = path.with_suffix(".txt").read_text(errors="replace").splitlines() or [""]
            found = [{"text": first, "language": "en"}] if first.strip() else []
            for language, region, text in (match.groups() for match in map(_TRANSLATION.fullmatch, rest) if match):
                found.append({"text": text, "language": language + (f"-{region}" if region else "")})
            if found:
                paths.append(path)
                captions.append(found[:64])
    return _write(folder, paths, STAMPS, captions)


def _write(folder: Path, paths: list[Path], root: Path, captions: list[list[dict]]) -> int:
    lines = []
    for path, texts in zip(paths, captions, strict=True):
        name = path.relative_to(root).as_posix()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        lines.append(json.dumps({"file_name": name, "captions": texts, "tags": [name.split("/")[0]]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
