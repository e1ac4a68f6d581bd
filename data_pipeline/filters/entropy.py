"""Entropy: pictures with nothing in them, and pictures that are nothing but noise.

The entropy of grey levels alone decides neither. A page of text on white has less than most flat drawings (0.1 to 1.6
bits, one word 0.02), a gradient has the most (8.0) and noise hardly more than a photograph (7.6 against 7.7). So two
more columns go with it: `edges` tells a page of text (0.0009 and above) from an empty one (0), and `roughness` tells
noise (0.9 to 1.3) from photographs, grass and gravel included (at most 0.53), and from text (at most 0.52). Measured on
the photographs of scikit-image, rendered pages, and noise that was blurred, enlarged or compressed as JPEG.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter

EDGE = 24  # grey levels between neighbours
WINDOW = 1024  # pixels per side of the central part that edges and roughness look at
SCALES = 3  # 1, 1/2, 1/4: noise that was enlarged or blurred is noise again when it is made smaller


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `ENTROPY` for each candidate."""
    return [_score(candidate.whole.preview_grey) for candidate in candidates]


def _score(grey: Image.Image) -> dict:
    pixels = np.asarray(grey)
    histogram = np.asarray(Image.fromarray(pixels[::2]).histogram(), dtype=np.float64)
    shares = histogram[histogram > 0] / histogram.sum()
    top, left = (max(0, (size - WINDOW) // 2) for size in pixels.shape)
    window = pixels[top : top + WINDOW, left : left + WINDOW]
    return {
        "bits": round(float(-np.sum(shares * np.log2(shares))), 4) + 0.0,  # + 0.0: no negative zero
        "edges": round(_edges(window), 6),
        "roughness": round(_roughness(window.astype(np.int16)), 4),
    }


def _edges(pixels: UInt8[np.ndarray, "H W"]) -> float:
    """Share of the pixels of every second row that differ from the one to the right or below by `EDGE` grey levels."""
    if min(pixels.shape) < 2:
        return 0.0
    here, right, below = pixels[:-1:2, :-1], pixels[:-1:2, 1:], pixels[1::2, :-1]
    # Unsigned differences of bytes: four times as fast as those of wider types.
    right, below = (np.maximum(here, there) - np.minimum(here, there) for there in (right, below))
    return np.count_nonzero(np.maximum(right, below) >= EDGE) / here.size


def _roughness(pixels: Int16[np.ndarray, "H W"]) -> float:
    """Variance of a pixel less the mean of its four neighbours, over the variance of the picture; 1.25 for white noise.

    The worst of the picture's scales, each from every second row; 0 for one that is less than 3 pixels wide or high,
    or of a single level.
    """
    worst = 0.0
    for scale in range(SCALES):  # pixels are sums of 4 ** scale grey levels, of which 32 * 255 fit
        if min(pixels.shape) < 3:
            break
        around = pixels[:-2:2, 1:-1] + pixels[2::2, 1:-1] + pixels[1:-1:2, :-2] + pixels[1:-1:2, 2:]
        variance = _variance(pixels[::2])
        if variance > 1e-3 * 16**scale:
            worst = max(worst, _variance(4 * pixels[1:-1:2, 1:-1] - around) / 16 / variance)
        H, W = (size // 2 * 2 for size in pixels.shape)
        rows = pixels[0:H:2, :W] + pixels[1:H:2, :W]
        pixels = rows[:, 0::2] + rows[:, 1::2]
    return worst


def _variance(values: Int16[np.ndarray, "H W"]) -> float:
    """Computed of integers that double precision holds exactly, in whatever order: the same on every machine."""
    exact = values.astype(np.float64)
    mean = exact.sum() / exact.size
    return float(np.square(exact, out=exact).sum() / exact.size - mean**2)


ENTROPY = Filter(
    name="entropy",
    version=2,
    columns={
        "bits": (float, "Shannon entropy of the grey-level histogram: solid 0, photographs 4..8"),
        "edges": (float, f"share of pixels that differ from a neighbour by {EDGE} of 255 grey levels"),
        "roughness": (float, "how little neighbours tell of a pixel, the worst of three scales: white noise 1.25"),
    },
    score=score,
)
