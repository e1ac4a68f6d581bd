"""Cut-outs: images of one object with transparency around it, and the object's name in several languages.

They come from a folder of PNG or WebP files with text files (`teapot.png`, `teapot.txt`), or from records with
transparency. The first line of a text file is the English name; lines such as `zh_CN.utf8=一个茶壶。` give the name in
other languages, as in Debian's `tuxpaint-stamps-default`.
"""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.records.schema import MAX_IMAGE_BYTES, Record
from qi2_jax.runtime.text_files import read_text

MIN_SIDE = 48  # pixels of the object's longer side
MAX_ASPECT = 4.0
MIN_SOLID = 0.75  # opaque share of the visible pixels; the rest may be a glow, a shadow or glass
MIN_COVERED = 0.15  # visible share of the object's box
MAX_COVERED = 0.97  # a full box is an image with a border, not a cut-out
MAX_WORDS = 5
MAX_TEXT_BYTES = 1 << 16

_NAME = re.compile(r"(an?)\s+([^\W\d_][\w’'-]*(?:\s+[\w’'-]+)*)", re.IGNORECASE)
_CHINESE = re.compile(r"[一-鿿]{2,12}")
_MEASURES = "个個只隻头頭匹条條朵棵株辆輛架艘把张張台臺座颗顆支枝件顶頂块塊片本双雙对對串束根盏盞面口幢间間"
_MEASURED = re.compile(f"一[{_MEASURES}]")


class Unsuitable(Exception):
    """An image that cannot be used, with the reason as its only argument."""


@dataclass(frozen=True)
class Cutout:
    """An object.

    Attributes:
      image: RGBA image, cropped to the object.
      name: name of its file or record.
      english: name with its article, such as `a red kangaroo`.
      chinese: name with its measure word, such as `一只红袋鼠`; None if unknown.
      licence: licence of the image.
    """

    image: Image.Image
    name: str
    english: str
    chinese: str | None
    licence: str | None

    @property
    def definite(self) -> str:
        return "the " + self.english.split(" ", 1)[1]

    @property
    def bare_chinese(self) -> str:
        """The Chinese name without number and measure word."""
        assert self.chinese is not None
        return _MEASURED.sub("", self.chinese, count=1)


@dataclass(frozen=True)
class CutoutFile:
    """An image file with a cut-out, and its text file."""

    path: Path
    name: str
    licence: str | None

    def read(self) -> Cutout:
        """Reads the cut-out and its names.

        Raises:
          Unsuitable: if the file is not a cut-out, or its name does not fit into a sentence.
        """
        try:
            text = read_text(_read(self.path.with_suffix(".txt"), MAX_TEXT_BYTES))
            data = _read(self.path, MAX_IMAGE_BYTES)
        except (OSError, ValueError):
            raise Unsuitable("cutout_unreadable") from None
        first, *others = text.split("\n")
        names = dict(line.split("=", 1) for line in others if "=" in line)
        chinese = next((names[key] for key in ("zh_CN.utf8", "zh.utf8") if key in names), None)
        return make_cutout(data, self.name, first, chinese, self.licence)


def find_cutouts(folder: Path, licence: str | None) -> list[CutoutFile]:
    """Finds all PNG and WebP files with a text file below a folder, sorted by name; links are not followed.

    Raises:
      ValueError: if there are none.
    """
    files = []
    for parent, _, names in os.walk(folder):
        present = set(names)
        for name in names:
            path = Path(parent, name)
            if name.lower().endswith((".png", ".webp")) and f"{path.stem}.txt" in present and not path.is_symlink():
                files.append(CutoutFile(path, path.relative_to(folder).as_posix(), licence))
    if not files:
        raise ValueError(f"{folder} has no PNG or WebP file with a .txt file of the same name")
    return sorted(files, key=lambda file: file.name)


def has_transparency(record: Record) -> bool:
    """Whether the image file of a pair declares transparency; its pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(record.image), formats=("PNG", "WEBP")) as image:
            return image.has_transparency_data and not record.conditions
    except Exception:  # decoders raise errors of any type on hostile bytes
        return False


def cutout_of_record(record: Record) -> Cutout:
    """Reads a cut-out from a record with transparency whose captions are names.

    Raises:
      Unsuitable: if the record is not a cut-out, or its name does not fit into a sentence.
    """
    english = next((c.text for c in record.captions if (c.language or "en").startswith("en")), "")
    chinese = next((c.text for c in record.captions if (c.language or "").startswith("zh")), None)
    return make_cutout(record.image, record.key, english, chinese, record.licence)


def make_cutout(data: bytes, name: str, english: str, chinese: str | None, licence: str | None) -> Cutout:
    """Checks that a file shows one opaque object on a transparent background, and normalises its names.

    Args:
      data: bytes of the image file.
      name: name of its file or record.
      english: text that begins with the name and its article, such as `A red kangaroo.`
      chinese: name such as `一只红袋鼠。`; other text is ignored.
      licence: licence of the image.

    Raises:
      Unsuitable: with the reason.
    """
    match = _NAME.match(english.strip())
    after = english.strip()[match.end() :] if match else ""
    if not match or len(match[0].split()) > MAX_WORDS + 1 or (after and after[0] not in ".;:!("):
        raise Unsuitable("cutout_without_name")
    try:
        image = decode_image(data).image
    except UndecodableImage:
        raise Unsuitable("cutout_undecodable") from None
    box = image.getchannel("A").point(lambda level: 255 * (level > 8)).getbbox() if image.mode == "RGBA" else None
    if box is None:
        raise Unsuitable("cutout_not_transparent")
    image = image.crop(box)
    alpha = np.asarray(image.getchannel("A"))
    covered, solid = float(np.mean(alpha > 8)), float(np.mean(alpha > 230))
    if max(image.size) < MIN_SIDE or max(image.size) > MAX_ASPECT * min(image.size):
        raise Unsuitable("cutout_too_small_or_thin")
    if not MIN_COVERED <= covered <= MAX_COVERED or solid < MIN_SOLID * covered:
        raise Unsuitable("cutout_not_solid")
    chinese = (chinese or "").strip().rstrip("。.！!")
    usable = chinese if _CHINESE.fullmatch(chinese) else None
    return Cutout(image, name, f"{match[1].lower()} {_lower_first(match[2])}", usable, licence)


def _lower_first(name: str) -> str:
    """Lowers the first letter, as in `red kangaroo`, unless other words have capitals, as in `Adelaide Rosella`."""
    words = name.split()
    return name if any(word[0].isupper() for word in words[1:]) else name[0].lower() + name[1:]


def _read(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{path} is larger than {limit} bytes")
    return data
