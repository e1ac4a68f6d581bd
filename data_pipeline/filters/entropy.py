"""Entropy: pictures with nothing in them, and pictures that are nothing but noise.

The entropy of grey levels alone decides neither. A page of text on white has less than most flat drawings (0.1 to 1.6
bits, one word 0.02), a gradient has the most (8.0) and noise hardly more than a photograph (7.6 against 7.7). So two
more columns go with it: `edges` tells a page of text (0.0009 and above) from an empty one (0), and `roughness` tells
noise (0.9 to 1.3) from photographs, grass and gravel included (at most 0.53), and from text (at most 0.52). Measured on
the photographs of scikit-image, rendered pages, and noise that was blurred, enlarged or compressed as JPEG.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter

EDGE = 24  # grey levels between neighbours
WINDOW = 1024  # pixels per side of the central part that edges and roughness look at
SCALES = (1, 2, 4)  # noise that was enlarged or blurred is noise again when it is made smaller


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `ENTROPY` for each candidate."""
    return [_score(candidate.grey) for candidate in candidates]


def _score(grey: Image.Image) -> dict:
    histogram = np.asarray(grey.histogram(), dtype=np.float64)
    shares = histogram[histogram > 0] / histogram.sum()
    pixels = np.asarray(central(grey, WINDOW), dtype=np.float32)
    return {
        "bits": round(float(-np.sum(shares * np.log2(shares))), 4) + 0.0,  # + 0.0: no negative zero
        "edges": round(_edges(pixels), 6),
        "roughness": round(max(_roughness(pixels, scale) for scale in SCALES), 4),
    }


def central(image: Image.Image, side: int) -> Image.Image:
    """The central part of an image, at most `side` pixels wide and high."""
    left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 2)
    return image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))


def _edges(pixels: Float[np.ndarray, "H W"]) -> float:
    """Share of the pixels that differ from the one to the right or below by `EDGE` grey levels."""
    if min(pixels.shape) < 2:
        return 0.0
    right, below = np.abs(np.diff(pixels, axis=1))[:-1], np.abs(np.diff(pixels, axis=0))[:, :-1]
    return float(np.mean(np.maximum(right, below) >= EDGE))


def _roughness(pixels: Float[np.ndarray, "H W"], scale: int) -> float:
    """Variance of a pixel less the mean of its four neighbours, over the variance of the picture; 1.25 for white noise.

    Of the picture reduced by `scale`; 0 for one that is then less than 3 pixels wide or high, or of a single level.
    """
    H, W = (size // scale for size in pixels.shape)
    if min(H, W) < 3:
        return 0.0
    small = pixels[: H * scale, : W * scale].reshape(H, scale, W, scale).mean((1, 3))
    around = (small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]) / 4
    variance = float(small.var())
    return float((small[1:-1, 1:-1] - around).var()) / variance if variance > 1e-3 else 0.0


ENTROPY = Filter(
    name="entropy",
    version=1,
    columns={
        "bits": (float, "Shannon entropy of the grey-level histogram: solid 0, photographs 4..8"),
        "edges": (float, f"share of pixels that differ from a neighbour by {EDGE} of 255 grey levels"),
        "roughness": (float, "how little neighbours tell of a pixel, the worst of three scales: white noise 1.25"),
    },
    score=score,
)
