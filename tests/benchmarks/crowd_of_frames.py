"""Time of the search for near duplicates among the frames of one film, which are all near to each other.

    python -m tests.benchmarks.crowd_of_frames [200 800 1600 6400]

The film is a still picture with noise, and a camera that pans and zooms over it: its frames have to be registered. The
time per frame must not grow with the number of frames, and all frames must end in one group.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.filters.duplicates import FINE_SIDE, coarse, gradient_hash, perceptual_hash, thumbnail
from data_pipeline.scoring.near_groups import group_near
from data_pipeline.scoring.pair_search import Contents, search
from data_pipeline.scoring.pairs import FINGERPRINT
from data_pipeline.scoring.windows import window_hashes
from data_pipeline.selection.thresholds import Thresholds

SIZE = 640, 480


def scene() -> Image.Image:
    """A picture with detail at several scales."""
    rng, levels = np.random.default_rng(0), np.zeros((SIZE[1], SIZE[0], 3))
    for cells, weight in ((3, 1.0), (8, 0.6), (24, 0.35), (80, 0.2)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        levels += weight * np.asarray(noise.resize(SIZE, Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((255 * (levels - levels.min()) / np.ptp(levels)).astype(np.uint8))


def film(frames: int, moving: bool) -> Contents:
    rng, prints, whole = np.random.default_rng(0), np.zeros(frames, FINGERPRINT), scene()
    for number in range(frames):
        left, top = (0.1 * abs(number / period % 2 - 1) if moving else 0 for period in (200, 77))
        box = (left * SIZE[0], top * SIZE[1], (left + 0.9) * SIZE[0], (top + 0.9) * SIZE[1])
        frame = np.asarray(whole.resize((160, 120), Image.Resampling.BILINEAR, box=box, reducing_gap=3))
        noisy = (frame + rng.normal(0, 2, frame.shape)).clip(0, 255).astype(np.uint8)
        cells = np.frombuffer(thumbnail(Image.fromarray(noisy)), np.uint8)
        luma = coarse(cells[: FINE_SIDE**2].reshape(FINE_SIDE, FINE_SIDE))
        prints[number] = int(perceptual_hash(luma), 16), int(gradient_hash(luma), 16), number, cells
    order, ones = np.arange(frames), np.ones(frames, np.int64)
    fine = prints["thumbnail"][:, : FINE_SIDE**2].reshape(-1, FINE_SIDE, FINE_SIDE)
    hashes = prints["phash"], prints["dhash"], window_hashes(coarse(fine))
    return Contents(order, order, ones, np.zeros(frames, np.uint64), *hashes, prints)


def main() -> None:
    counts = [int(argument) for argument in sys.argv[1:]] or [200, 800, 1600, 6400]
    print("film     frames  CPU s  ms/frame  pairs/frame  groups")
    for moving in (False, True):
        for frames in counts:
            contents = film(frames, moving)
            begun = time.process_time()
            near = search(contents, Path())
            seconds = time.process_time() - begun
            near = near[near["difference"] <= Thresholds().near_difference]
            groups = group_near(np.arange(frames), np.ones(frames, bool), near["left"], near["right"])
            print(
                f"{'moving' if moving else 'still':7s} {frames:7d} {seconds:6.1f} {1000 * seconds / frames:9.2f} "
                f"{len(near) / frames:12.1f} {len(set(groups)):7d}",
                flush=True,
            )


if __name__ == "__main__":
    main()
