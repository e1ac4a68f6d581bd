"""What a job shows in the end: one picture of all samples, and how near each lies to its training image."""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from qi2_jax.pixels import over_white
from qi2_jax.reporting import sheet

THUMB = 64  # pixels per side at which pictures are compared, whatever their shape
CELL, COLUMNS = 136, 3  # pixels of the longer side of a picture; samples beside each other


def nearest_is_own(
    samples: Sequence[UInt8[np.ndarray, "H W c"]],
    pictures: Iterable[UInt8[np.ndarray, "H W c"]],
    owners: Sequence[int],
) -> list[bool]:
    """For each sample, whether its own training picture is the nearest of all: mean squared error of RGB thumbnails.

    Args:
      samples, pictures: pixels 0..255, of any sizes; alpha is laid over white. Pictures are looked at one by one.
      owners: for each sample the index of its own picture.
    """
    ours = np.stack([_thumb(sample) for sample in samples])
    nearest, least = np.zeros(len(samples), int), np.full(len(samples), np.inf)
    for index, picture in enumerate(pictures):
        distances = np.mean((ours - _thumb(picture)) ** 2, axis=(1, 2, 3))
        nearest[distances < least] = index
        least = np.minimum(least, distances)
    return (nearest == np.asarray(owners)).tolist()


def _thumb(pixels) -> Float[np.ndarray, "64 64 3"]:
    image = over_white(Image.fromarray(pixels))
    return np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX), np.float32)


def draw(
    path: pathlib.Path,
    texts: Sequence[str],
    triples: Sequence[tuple[UInt8[np.ndarray, "H W c"], ...]],
    titles: Sequence[str],
) -> None:
    """Writes one picture: for each text its images side by side, with `titles` above each column of images."""
    cells = [
        [
            ImageOps.contain(over_white(Image.fromarray(pixels)), (CELL, CELL), Image.Resampling.LANCZOS)
            for pixels in own
        ]
        for own in triples
    ]
    sheet.lay_out(cells, titles, [sheet.in_ascii(text) for text in texts], COLUMNS).save(path)
