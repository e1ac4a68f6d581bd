"""The demo's results: one grid of all generated images, and how near each is to its training image."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from qi2_jax.pixels import over_white
from qi2_jax.reporting.grid import in_ascii, lay_out

THUMBNAIL = 64  # pixels per side at which images are compared, whatever their shape
CELL, COLUMNS = 136, 3  # pixels of the longer side of an image; captions beside each other


def is_nearest(
    generated: Sequence[UInt8[np.ndarray, "_ _ _"]],
    images: Iterable[UInt8[np.ndarray, "_ _ _"]],
    targets: Sequence[int],
) -> list[bool]:
    """Whether the training image of each generated image is the nearest of all training images.

    The distance is the mean squared error of RGB thumbnails.

    Args:
      generated: pixels 0..255, of any sizes; alpha is composited over white.
      images: training images in the same form; they are read one by one.
      targets: index of the training image of each generated image.
    """
    ours = np.stack([_thumbnail(image) for image in generated])
    nearest, least = np.zeros(len(generated), int), np.full(len(generated), np.inf)
    for index, image in enumerate(images):
        distances = np.mean((ours - _thumbnail(image)) ** 2, axis=(1, 2, 3))
        nearest[distances < least] = index
        least = np.minimum(least, distances)
    return (nearest == np.asarray(targets)).tolist()


def _thumbnail(pixels: UInt8[np.ndarray, "H W c"]) -> Float[np.ndarray, "64 64 3"]:
    image = over_white(Image.fromarray(pixels))
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32)


def draw(
    path: pathlib.Path,
    texts: Sequence[str],
    triples: Sequence[tuple[UInt8[np.ndarray, "_ _ c"], ...]],
    titles: Sequence[str],
) -> None:
    """Writes a grid with the images of each text side by side.

    Args:
      path: file to write.
      texts: text of each row of images.
      triples: images of each text, 0..255.
      titles: titles of the columns.
    """
    cells = [
        [
            ImageOps.contain(over_white(Image.fromarray(pixels)), (CELL, CELL), Image.Resampling.LANCZOS)
            for pixels in images
        ]
        for images in triples
    ]
    lay_out(cells, titles, [in_ascii(text) for text in texts], COLUMNS).save(path)
