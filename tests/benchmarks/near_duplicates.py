"""How well changed copies of real pictures are told from other pictures, with the default thresholds.

    apt-get install mate-backgrounds tuxpaint-stamps-default
    python tests/benchmarks/near_duplicates.py [FOLDER ...]

The figures in the docstring of `data_pipeline.scoring.pairs` come from here.
"""

import io
import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.filters.base import Candidate
from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.schema import Caption, Record
from data_pipeline.scoring.pairs import differences
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.pixels import over_white

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
}
OTHERS = {
    "another word, large": [text(word, (0.5, 0.5), 1 / 6, outline=True) for word in ("SUMMER", "WINTER")],
    "another ending, large": [text(word, (0.5, 0.5), 1 / 6, outline=True) for word in ("SUMMER", "SUMMIT")],
    "another line, small": [
        text(word, (0.5, 0.8), 1 / 12, outline=True) for word in ("Open Monday 9", "Open Friday 8")
    ],
}


def fingerprint(image: Image.Image) -> tuple[int, int, np.ndarray, float]:
    import base64

    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    record = Record("key", buffer.getvalue(), (Caption("x"),), "benchmark")
    candidate = Candidate(record, decode_image(record.image), None)
    (row,), (entropy,) = DUPLICATES.score([candidate]), ENTROPY.score([candidate])
    cells = np.frombuffer(base64.b64decode(row["thumbnail"]), np.uint8)
    return int(row["phash"], 16), int(row["dhash"], 16), cells, entropy["bits"]


def share_near(pairs: list, thresholds: Thresholds) -> float:
    worst = differences(np.stack([one[2] for one, _ in pairs]), np.stack([other[2] for _, other in pairs]))
    near = [
        (one[0] ^ other[0]).bit_count() <= thresholds.near_distance
        or (one[1] ^ other[1]).bit_count() <= thresholds.near_gradient
        for one, other in pairs
    ]
    return float(np.mean(np.array(near) & (worst <= thresholds.near_difference)))


def main() -> None:
    thresholds, pictures = Thresholds(), []
    for folder in sys.argv[1:] or FOLDERS:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                try:
                    image = over_white(decode_image(path.read_bytes()).image)
                except UndecodableImage:
                    continue
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                if min(image.size) >= SMALLEST and (found := fingerprint(image))[3] >= thresholds.near_min_entropy:
                    pictures.append((path.name, image, found))
    print(f"{len(pictures)} pictures with at least {thresholds.near_min_entropy} bits of entropy")
    print(f"{'copies that are found':>28}")
    for name, change in COPIES.items():
        share = share_near([(found, fingerprint(change(image))) for _, image, found in pictures], thresholds)
        print(f"{name:>28} {share:>7.1%}")
    print(f"{'other pictures taken for it':>28}")
    for name, (one, other) in OTHERS.items():
        share = share_near(
            [(fingerprint(one(image)), fingerprint(other(image))) for _, image, _ in pictures], thresholds
        )
        print(f"{name:>28} {share:>7.1%}")
    for i, (name, _, found) in enumerate(pictures):
        for other_name, _, other in pictures[:i]:
            if share_near([(found, other)], thresholds):
                print(f"near to each other as they came: {other_name}, {name}")


if __name__ == "__main__":
    main()
