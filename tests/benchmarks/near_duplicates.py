"""Recall of copies of real pictures, and how many other pictures are taken for copies, with the default thresholds.

    apt-get install mate-backgrounds tuxpaint-stamps-default
    python -m tests.benchmarks.near_duplicates [FOLDER ...]

Every pair is compared, so this measures hashes and thumbnails. `tests/benchmarks/data_guarantees.py` measures the whole
search, which compares only the pairs that meet under a common key.
"""

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.schema import Caption, Record
from data_pipeline.scoring.candidates import PAIR
from data_pipeline.scoring.pairs import FINGERPRINT, confirm_near
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.pixels import over_white
from tests.data_pipeline.real_images import burst, crop

FOLDERS = ("/usr/share/backgrounds/mate", f"{Path(skimage.__file__).parent}/data", "/usr/share/tuxpaint/stamps")
SIDE, SMALLEST = 1024, 128


def text(words: str, place: tuple[float, float], size: float, opacity: float = 1.0, outline: bool = False):
    def draw(image: Image.Image) -> Image.Image:
        top, font = image.copy(), ImageFont.load_default(max(8, int(image.width * size)))
        at = place[0] * image.width, place[1] * image.height
        stroke = max(1, image.width // 250) if outline else 0
        ImageDraw.Draw(top).text(at, words, "white", font, "mm", stroke_width=stroke, stroke_fill="black")
        return Image.blend(image, top, opacity)

    return draw


def tiled(image: Image.Image) -> Image.Image:
    for row in range(5):
        for column in range(4):
            image = text("SAMPLE", (column / 3 + row % 2 / 6, (row + 0.5) / 5), 1 / 18, 0.3)(image)
    return image


def label(image: Image.Image) -> Image.Image:
    top, (w, h) = image.copy(), image.size
    ImageDraw.Draw(top).rectangle((0.7 * w, 0.85 * h, 0.97 * w, 0.96 * h), "white")
    ImageDraw.Draw(top).text((0.835 * w, 0.9 * h), "STOCK", "black", ImageFont.load_default(max(8, w // 18)), "mm")
    return Image.blend(image, top, 0.5)


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


COPIES = {
    "JPEG at quality 30": jpeg,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "brightness x 1.3": lambda image: image.point(lambda value: min(255, round(1.3 * value))),
    "brightness x 0.7": lambda image: image.point(lambda value: round(0.7 * value)),
    "watermark, middle, 40 %": text("© SAMPLE", (0.5, 0.5), 1 / 8, 0.4),
    "watermark, corner, 70 %": text("photo.example.com", (0.75, 0.95), 1 / 20, 0.7),
    "watermark, tiled, 30 %": tiled,
    "opaque label": label,
    "a word added, large": text("SUMMER", (0.5, 0.5), 1 / 6, outline=True),
    "crop of 2 %": lambda image: crop(image, 0.02),
    "crop of 5 %": lambda image: crop(image, 0.05),
    "crop of 10 %": lambda image: crop(image, 0.1),
    "crop of 10 %, one corner": lambda image: image.crop((image.width // 10, image.height // 10, *image.size)),
    "burst": lambda image: burst(image, image.width * image.height),
}
OTHERS = {
    "another word, large": [text(word, (0.5, 0.5), 1 / 6, outline=True) for word in ("SUMMER", "WINTER")],
    "another ending, large": [text(word, (0.5, 0.5), 1 / 6, outline=True) for word in ("SUMMER", "SUMMIT")],
    "another line, small": [
        text(word, (0.5, 0.8), 1 / 12, outline=True) for word in ("Open Monday 9", "Open Friday 8")
    ],
    "another word, crop of 5 %": [
        text("SUMMER", (0.5, 0.5), 1 / 6, outline=True),
        lambda image: crop(text("SUMMIT", (0.5, 0.5), 1 / 6, outline=True)(image), 0.05),
    ],
}


def fingerprint(image: Image.Image) -> tuple[np.ndarray, float]:
    """FINGERPRINT and entropy in bits."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    record = Record("key", buffer.getvalue(), (Caption("x"),), "benchmark")
    candidate = Candidate(record, decode_image(record.image), None)
    (row,), (entropy,) = DUPLICATES.score([candidate]), ENTROPY.score([candidate])
    fingerprint = np.zeros((), FINGERPRINT)
    fingerprint["phash"], fingerprint["dhash"] = int(row["phash"], 16), int(row["dhash"], 16)
    fingerprint["pixels"] = int(row["pixels_sha256"][:16], 16)
    fingerprint["thumbnail"] = np.frombuffer(base64.b64decode(row["thumbnail"]), np.uint8)
    return fingerprint, entropy["bits"]


def near_pairs(one: list[np.ndarray], other: list[np.ndarray], thresholds: Thresholds) -> np.ndarray:
    """Positions at which the two images are near."""
    pairs = np.zeros(len(one), PAIR)
    pairs["left"] = np.arange(len(one))
    found = confirm_near(pairs, np.stack(one)[:, None], np.stack(other)[:, None])
    proposed = (found["distance"] <= thresholds.near_distance) | (found["gradient"] <= thresholds.near_gradient)
    return found["left"][proposed & (found["difference"] <= thresholds.near_difference)]


def read_pictures(folders: Sequence[str], thresholds: Thresholds) -> list[tuple[str, Image.Image, np.ndarray]]:
    pictures = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*") if path.is_file()):
        try:
            image = over_white(decode_image(path.read_bytes()).image)
        except UndecodableImage:
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        if min(image.size) >= SMALLEST:
            found, bits = fingerprint(image)
            if bits >= thresholds.near_min_entropy:
                pictures.append((path.name, image, found))
    return pictures


def main() -> None:
    thresholds = Thresholds()
    pictures = read_pictures(sys.argv[1:] or FOLDERS, thresholds)
    whole = [found for _, _, found in pictures]
    print(f"{len(pictures)} pictures with at least {thresholds.near_min_entropy} bits of entropy")
    print(f"{'copies that are found':>28}")
    for name, change in COPIES.items():
        found = near_pairs(whole, [fingerprint(change(image))[0] for _, image, _ in pictures], thresholds)
        print(f"{name:>28} {len(found) / len(pictures):>7.1%}", flush=True)
    print(f"{'other pictures taken for it':>28}")
    for name, (one, other) in OTHERS.items():
        sides = ([fingerprint(change(image))[0] for _, image, _ in pictures] for change in (one, other))
        print(f"{name:>28} {len(near_pairs(*sides, thresholds)) / len(pictures):>7.1%}", flush=True)
    total, names = 0, []
    for i, (name, _, found) in enumerate(pictures[1:], start=1):
        close = near_pairs([found] * i, whole[:i], thresholds)
        total, names = total + i, names + [(pictures[j][0], name) for j in close]
    print(f"of {total:,} pairs as they came, {len(names)} are near to each other:")
    for one, other in names:
        print(f"  {one}, {other}")


if __name__ == "__main__":
    main()
