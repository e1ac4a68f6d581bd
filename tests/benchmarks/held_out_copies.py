"""How many mirrored, turned and grey copies share the hold-out number of their original, and which other images do.

apt-get install mate-backgrounds
python -m tests.benchmarks.held_out_copies
"""

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageEnhance

from data_pipeline.filters.duplicates import DUPLICATES
from data_pipeline.filters.entropy import ENTROPY
from data_pipeline.records.schema import Caption, Record
from data_pipeline.records.shards import write_shards
from data_pipeline.scoring import hold_out
from data_pipeline.scoring.cascade import score
from data_pipeline.scoring.hold_out import read_numbers
from data_pipeline.synthesis.text.synthesis import synthesize_text
from tests.data_pipeline.real_images import bytes_of, crop, photographs

TURNS = Image.Transpose


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(TURNS.FLIP_LEFT_RIGHT)


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


COPIES = {
    "mirrored": mirrored,
    "mirrored up and down": lambda image: image.transpose(TURNS.FLIP_TOP_BOTTOM),
    "turned by 90 degrees": lambda image: image.transpose(TURNS.ROTATE_90),
    "turned by 180 degrees": lambda image: image.transpose(TURNS.ROTATE_180),
    "turned by 270 degrees": lambda image: image.transpose(TURNS.ROTATE_270),
    "grey": grey,
    "grey and mirrored": lambda image: grey(mirrored(image)),
    "mirrored, brightness x 1.2": lambda image: ImageEnhance.Brightness(mirrored(image)).enhance(1.2),
    "mirrored, crop of 5 %": lambda image: crop(mirrored(image), 0.05),
    "mirrored, crop of 10 %": lambda image: crop(mirrored(image), 0.1),
    "crop to a quarter": lambda image: image.crop((0, 0, image.width // 2, image.height // 2)),
}


def numbers(images: dict[str, Image.Image], quality: int) -> dict[str, float]:
    """The hold-out number of every image, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        records = (
            Record(name, bytes_of(image, quality=quality), (Caption("a picture"),), "benchmark")
            for name, image in images.items()
        )
        write_shards(folder, records, records_per_shard=256)
        score(folder, filters=(DUPLICATES, ENTROPY), workers=1, progress=False)
        hold_out.paths(folder)[1].unlink()
        start = time.process_time()
        hold_out.score_hold_out(folder, progress=False)
        cost = (time.process_time() - start) / len(images) * 1e3
        print(f"{len(images)} images: {cost:.2f} ms of CPU time per image for the hold-out numbers", file=sys.stderr)
        return dict(zip(images, read_numbers(folder), strict=True))


def main() -> None:
    originals = {str(number): image for number, image in enumerate(photographs(2, 512))}
    images = dict(originals)
    for key, image in originals.items():
        for name, change in COPIES.items():
            copy = change(image)
            images[f"{key} {name}"] = copy.resize((copy.width * 2 // 3, copy.height * 2 // 3))
    found = numbers(images, 60)
    print(f"of {len(originals)} photographs, {len({found[key] for key in originals})} have different numbers")
    for name in COPIES:
        print(f"{name:>28}: {sum(found[key] == found[f'{key} {name}'] for key in originals)}")
    tiles = {str(number): image for number, image in enumerate(photographs(4, 512))}
    print(f"of {len(tiles)} tiles, {len(set(numbers(tiles, 92).values()))} have different numbers")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder, "pages")
        synthesize_text(pages, count=200, workers=1, progress=False)
        score(pages, filters=(DUPLICATES, ENTROPY), workers=1, progress=False)
        found_pages = read_numbers(pages)
    print(f"of {len(found_pages)} pages of synthetic text, {len(set(found_pages))} have different numbers")


if __name__ == "__main__":
    main()
