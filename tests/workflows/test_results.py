"""The last step's figures and grid."""

import numpy as np
from PIL import Image

from qi2_jax.workflows import results


def random_image(seed, height=64, width=96, channels=4):
    smooth = np.random.default_rng(seed).integers(0, 256, (4, 6, channels), np.uint8)
    image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    if channels == 4:
        pixels[..., 3] = 255
    return pixels


def test_only_the_training_image_of_a_generated_one_counts_as_nearest():
    images = [random_image(0), random_image(1, 96, 64), random_image(2, channels=3)]
    noisy = [
        np.clip(p.astype(int) + np.random.default_rng(9).integers(-20, 21, p.shape), 0, 255).astype(np.uint8)
        for p in images
    ]
    assert results.is_nearest(noisy, images, [0, 1, 2]) == [True, True, True]
    assert results.is_nearest(noisy, images, [0, 2, 1]) == [True, False, False]


def test_draw_shows_every_image(tmp_path):
    triples = [(random_image(i), random_image(i + 10, 96, 64), random_image(i + 20, 32, 128)) for i in range(4)]
    results.draw(
        tmp_path / "grid.png", ["a caption\nof two lines", "x" * 500, "木", ""], triples, ("one", "two", "three")
    )
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    assert grid.shape[0] > 2 * results.CELL and grid.shape[1] > 9 * results.CELL
    cell = grid[60:100, 20:120]
    assert cell.std() > 10, "the first image is drawn in its place"
