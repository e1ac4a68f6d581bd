"""The demo set: a folder of good images with every kind of bad image planted in it, created without network access.

    from data_pipeline.demo.dataset import write_demo_folder
    summary = write_demo_folder("runs/demo")

It needs `pip install qi2[demo]`, because the photographs are part of those packages.
"""

import importlib.util
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.demo.images import OWN, PHOTOS, SIGNS, Photo, Sign
from data_pipeline.records.schema import Caption
from data_pipeline.selection.index import Dropped

_ORIENTATION, _EXIF_IFD, _EXIF_WIDTH, _EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
_QUARTER_TURN = 6  # EXIF: viewers rotate the stored pixels clockwise by 90 degrees


@dataclass(frozen=True)
class DemoSummary:
    """Content of a demo folder.

    Attributes:
      clean: keys that a selection with default thresholds keeps, in order.
      dropped: keys that such a selection drops, with the reason.
      refused: number of entries that ingestion refuses, by reason.
    """

    clean: tuple[str, ...]
    dropped: dict[str, Dropped]
    refused: dict[str, int]


def write_demo_folder(out: Path | str) -> DemoSummary:
    """Writes the demo set: `clean/`, `planted/` and a `metadata.jsonl` with captions and licences.

    Raises:
      ValueError: if `out` exists and is not empty.
      ImportError: if the packages with the photographs are not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose a new folder")
    originals = {package: package_folder(package) for package in {photo.package for photo in PHOTOS}}
    for name in ("clean", "planted"):
        (out / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for photo in PHOTOS:
        _write_photo(photo, originals[photo.package] / photo.path, out / "clean" / photo.name)
        lines.append(_line(f"clean/{photo.name}", photo.captions, photo.licence))
    for sign in SIGNS:
        _render(sign).save(out / "clean" / sign.name)
        lines.append(_line(f"clean/{sign.name}", (Caption(sign.caption, "text", "en"),), OWN))
    clean = tuple(sorted(f"clean/{image.name}" for image in (*PHOTOS, *SIGNS)))

    dropped = _plant_images(out)
    caption = (Caption("Planted for the filters to find.", language="en"),)
    lines += [_line(key, caption, OWN) for key in dropped]

    Image.new("RGB", (300, 300), "teal").save(out / "planted/uncaptioned.png")
    lines += [
        json.dumps({"file_name": "planted/uncaptioned.png"}),
        json.dumps({"file_name": "planted/absent.png", "text": "This file does not exist."}),
        json.dumps({"file_name": "../outside.png", "text": "This path leaves the folder."}),
        lines[0],  # the same line again
        "this line is not JSON",
    ]
    refused = dict.fromkeys(("missing_caption", "missing_file", "outside_folder", "duplicate_key", "bad_json"), 1)
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DemoSummary(clean, dropped, refused)


def package_folder(package: str) -> Path:
    """The folder of a package; raises an ImportError with the pip command if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the demo photographs are inside {package}, which is not installed: pip install 'qi2[demo]'")
    return Path(spec.submodule_search_locations[0])


def _line(key: str, captions: tuple[Caption, ...], licence: str) -> str:
    fields = {"file_name": key, "captions": [asdict(caption) for caption in captions], "licence": licence}
    return json.dumps(fields, ensure_ascii=False)


def _write_photo(photo: Photo, original: Path, path: Path) -> None:
    with Image.open(original) as opened:
        image = opened.crop(photo.box) if photo.box else opened.copy()
    exif = Image.Exif()
    if photo.turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[_ORIENTATION] = _QUARTER_TURN
    image.save(path, quality=95, exif=exif)


def _render(sign: Sign) -> Image.Image:
    image = Image.new("RGBA", sign.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    for text, size, colour, (x, y) in sign.lines:
        position = (round(x * sign.size[0]), round(y * sign.size[1]))
        draw.text(position, text, fill=colour, font=ImageFont.load_default(size), anchor="mm")
    if sign.frame:
        draw.rectangle((12, 12, sign.size[0] - 13, sign.size[1] - 13), outline=sign.frame, width=10)
    image = image.rotate(sign.angle, Image.Resampling.BICUBIC)
    if sign.ground == "transparent":
        return image
    return Image.alpha_composite(Image.new("RGBA", sign.size, sign.ground), image).convert("RGB")


def _plant_images(out: Path) -> dict[str, Dropped]:
    """Writes the bad images. Their keys sort after those of clean ones, so that selection drops the copies."""
    clean, planted = out / "clean", out / "planted"

    flower = (clean / "flower.jpg").read_bytes()
    (planted / "truncated.jpg").write_bytes(flower[: len(flower) // 2])
    (planted / "words.png").write_text("These are words, not an image.\n")
    (planted / "empty.png").write_bytes(b"")

    with Image.open(clean / "coffee.png") as coffee, Image.open(clean / "hubble.jpg") as hubble:
        exif = Image.Exif()
        exif[_ORIENTATION] = _QUARTER_TURN
        exif[_EXIF_IFD] = {_EXIF_WIDTH: coffee.height, _EXIF_HEIGHT: coffee.width}
        coffee.save(planted / "sideways.jpg", exif=exif)
        coffee.crop((100, 50, 260, 170)).save(planted / "small.png")
        hubble.crop((0, 0, 1000, 280)).save(planted / "long.png")

        shutil.copyfile(clean / "coffee.png", planted / "same-bytes.png")
        exif = Image.Exif()
        exif[_ORIENTATION] = _QUARTER_TURN
        coffee.transpose(Image.Transpose.ROTATE_90).save(planted / "same-pixels-turned.png", exif=exif)
    with Image.open(clean / "astronaut.png") as astronaut, Image.open(clean / "retina.jpg") as retina:
        astronaut.save(planted / "same-pixels.png", compress_level=1)
        astronaut.save(planted / "recompressed.jpg", quality=30)
        retina.resize((retina.width // 2, retina.height // 2)).save(planted / "half-size.png")

    def duplicate(reason: str, name: str) -> Dropped:
        return Dropped("duplicates", reason, f"clean/{name}")

    return {
        "planted/truncated.jpg": Dropped("broken", "undecodable"),
        "planted/words.png": Dropped("broken", "unknown_format"),
        "planted/empty.png": Dropped("broken", "empty"),
        "planted/sideways.jpg": Dropped("orientation", "already_turned"),
        "planted/small.png": Dropped("resolution", "too_small"),
        "planted/long.png": Dropped("resolution", "too_long"),
        "planted/same-bytes.png": duplicate("same_bytes", "coffee.png"),
        "planted/same-pixels.png": duplicate("same_pixels", "astronaut.png"),
        "planted/same-pixels-turned.png": duplicate("same_pixels", "coffee.png"),
        "planted/recompressed.jpg": duplicate("near", "astronaut.png"),
        "planted/half-size.png": duplicate("near", "retina.jpg"),
    }
