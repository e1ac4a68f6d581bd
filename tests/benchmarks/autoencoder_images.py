"""Images to train a small autoencoder on, and others to judge it: `python -m tests.benchmarks.autoencoder_images OUT`.

Writes OUT/train and OUT/unseen, each with a folder of photographs and one of text. Photographs are those of the Debian
packages that `PACKAGES` names, reduced to a shorter side of 512 pixels; what shows the same scene is on one side only.
Text is drawn as by `text_pages`, in Latin and Chinese, in typefaces of which either side has its own.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decoding.images import decode_image
from qi2_jax.pixels import over_white
from tests.benchmarks.text_pages import KINDS, draw_page

PACKAGES = ("mate-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHORTER = 512  # pixels
MIN_ENTROPY = 3.0  # bits of the histogram of luminance; drawings and plain backgrounds have less
MAX_DISTANCE = 10  # of 64 bits: the same scene, resized or cropped a little
UNSEEN = 0.3  # share of scenes
PAGES = 120  # for each script, of the training side; the other has a third


def photographs() -> list[tuple[str, Image.Image]]:
    """All photographs of the installed packages by name."""
    found = []
    for package in PACKAGES:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
        for path in sorted(Path(line) for line in listed.splitlines() if line.lower().endswith(SUFFIXES)):
            if path.is_symlink():
                continue
            image = over_white(decode_image(path.read_bytes()).image)
            histogram = np.array(image.convert("L").histogram(), float) / (image.width * image.height)
            if -np.sum(histogram * np.log2(np.maximum(histogram, 1e-12))) < MIN_ENTROPY or min(image.size) < SHORTER:
                continue
            scale = SHORTER / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            found.append((f"{package}-{path.stem}", image.resize(size, Image.Resampling.LANCZOS)))
    return found


def scenes(images: list[Image.Image]) -> list[int]:
    """The number of the scene that each image shows, by difference hashes; some numbers may have no image.

    An image that is near to several scenes joins them.
    """
    hashes: list[np.ndarray] = []
    numbers: list[int] = []
    for image in images:
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
        bits = (grey[:, 1:] > grey[:, :-1]).ravel()
        near = {n for n, other in zip(numbers, hashes, strict=True) if np.sum(bits != other) <= MAX_DISTANCE}
        joined = min(near, default=max(numbers, default=-1) + 1)
        numbers = [joined if n in near else n for n in numbers] + [joined]
        hashes.append(bits)
    return numbers


def main(out: Path) -> None:
    found = photographs()
    numbers = scenes([image for _, image in found])
    order = np.random.default_rng(0).permutation(max(numbers) + 1)
    unseen = set(order[: round(UNSEEN * len(order))].tolist())
    for (name, image), number in zip(found, numbers, strict=True):
        folder = out / ("unseen" if number in unseen else "train") / "photographs"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}.png")
    for side, pages, part in (("train", PAGES, 0), ("unseen", PAGES // 3, 1)):
        folder = out / side / "text"
        folder.mkdir(parents=True)
        for kind, (language, size) in KINDS.items():
            for number in range(pages):
                image, text = draw_page(number + part * PAGES, language, size, part=part)
                image.save(folder / f"{kind}-{number:04d}.png")
                (folder / f"{kind}-{number:04d}.txt").write_text(text + "\n", encoding="utf-8")
        counts = {folder.name: len(list(folder.glob("*.png"))) for folder in sorted((out / side).iterdir())}
        print(side, counts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
