"""Images per second and core of the cheap filters beside a plain loop, and of every filter by itself.

Run `python tests/benchmarks/data_rates.py` (a minute; needs the Debian package mate-backgrounds). The pictures are 600
JPEG files of 0.5 megapixels, cut from photographs. Both sides read them from disk; processor time counts, so that other
load on the machine matters little, and the best of several rounds, in which the sides take turns.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import io
import sys
import tempfile
import time
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_pipeline.decoding.images import decode_image
from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Candidate
from data_pipeline.records.schema import Caption, Record
from tests.data_pipeline import real_images

COUNT, PIXELS, ROUNDS = 600, 500_000, 3
CHEAP = ("description", "broken", "orientation", "resolution", "duplicates", "entropy")
CAPTIONS = (Caption("A wide meadow in the light of a late afternoon, with a row of trees behind it.", language="en"),)


def write_pictures(folder: Path) -> list[Path]:
    rng, paths = np.random.default_rng(0), []
    pictures = list(real_images.photographs(2, 1600))
    for index in range(COUNT):
        picture = pictures[index % len(pictures)]
        width, height = (int(size * rng.uniform(0.7, 1)) for size in picture.size)
        left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(picture.size, (width, height), strict=True))
        part = picture.crop((left, top, left + width, top + height))
        factor = (PIXELS / (width * height)) ** 0.5
        part = part.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS)
        paths.append(folder / f"{index:04d}.jpg")
        part.save(paths[-1], quality=int(rng.choice((75, 85, 90, 95))))
    return paths


def plain(path: Path) -> tuple:
    """What a first script would do."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))).convert("RGB")
    return image.size, image.entropy(), str(imagehash.phash(image))


def candidate(path: Path) -> Candidate:
    data = path.read_bytes()
    return Candidate(Record(path.name, data, CAPTIONS, "benchmark"), decode_image(data, preview_first=True), None)


def cheap(path: Path) -> list:
    one = candidate(path)
    return [filter.score([one]) for filter in CASCADE if filter.name in CHEAP]


def seconds(function, items) -> float:
    start = time.process_time()
    for item in items:
        function(item)
    return time.process_time() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder))
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(f"{len(paths)} JPEG files of {PIXELS / 1e6} megapixels, {size / 1e3:.0f} kB on average")
        sides = {"plain loop: read, decode, EXIF, entropy, pHash": plain, f"ours: {', '.join(CHEAP)}": cheap}
        best = dict.fromkeys(sides, np.inf)
        for _ in range(ROUNDS):
            for name, function in sides.items():
                best[name] = min(best[name], seconds(function, paths))
        for name, spent in best.items():
            print(f"  {name:75s} {len(paths) / spent:6.0f} images/s per core, {1e3 * spent / len(paths):6.3f} ms")
        first, second = best.values()
        print(f"  ours / plain: {first / second:.2f}")

        print("every filter by itself, on pictures that are decoded already")
        some = paths[:: max(1, len(paths) // 60)]
        for filter in (filter for filter in CASCADE if filter.can_score):
            spent = np.inf
            for _ in range(ROUNDS):
                candidates = [candidate(path) for path in some]
                for one in candidates:  # what several filters share is made once
                    _ = one.target.preview_grey, one.target.grey, one.target.image
                spent = min(spent, seconds(lambda one, score=filter.score: score([one]), candidates))
            print(f"  {filter.name:20s} {len(some) / spent:9.0f} images/s per core, {1e3 * spent / len(some):7.3f} ms")
        spent = min(seconds(lambda path: decode_image(path.read_bytes()).image, some) for _ in range(ROUNDS))
        print(
            f"  {'(decode to RGB)':20s} {len(some) / spent:9.0f} images/s per core, {1e3 * spent / len(some):7.3f} ms"
        )


if __name__ == "__main__":
    main()
