"""Image quality: clarity, exposure and noise.

Of the grey picture reduced to at most `SIDE` pixels per side, so that scores of different resolutions compare.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter, within

SIDE = 1024
DARK, BRIGHT = 8, 247  # grey levels up to which, and from which, nothing can be told apart any more


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `QUALITY` for each candidate."""
    return [_score(within(candidate.whole.grey, SIDE)) for candidate in candidates]


def _score(grey: Image.Image) -> dict:
    levels = np.asarray(grey.histogram(), dtype=np.float64) / (grey.width * grey.height)
    pixels = np.asarray(grey).astype(np.int16)
    return {
        "clarity": round(_laplacian_variance(pixels), 4),
        "brightness": round(float(levels @ np.arange(256)) / 255, 4),
        "dark": round(float(levels[: DARK + 1].sum()), 4),
        "bright": round(float(levels[BRIGHT:].sum()), 4),
        "noise": round(_noise(pixels), 4),
    }


def _laplacian_variance(pixels: Int16[np.ndarray, "H W"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000)."""
    if min(pixels.shape) < 3:
        return 0.0
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return float((around - 4 * pixels[1:-1, 1:-1]).var(dtype=np.float64))


def _noise(pixels: Int16[np.ndarray, "H W"]) -> float:
    """Standard deviation of white noise in grey levels (Immerkaer, CVIU 1996), by the median, which edges do not move.

    The kernel [[1, -2, 1], [-2, 4, -2], [1, -2, 1]] removes what is smooth; on white noise of deviation s its response
    is normal with deviation 6 s, whose absolute value has the median 0.6745 * 6 s.
    """
    if min(pixels.shape) < 3:
        return 0.0
    rows = pixels[:-2] - 2 * pixels[1:-1] + pixels[2:]
    response = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:])
    below = np.cumsum(np.bincount(response.ravel()))  # the median of whole numbers, ten times as fast as by sorting
    middle = (response.size - 1) // 2, response.size // 2
    return float(np.searchsorted(below, middle, side="right").mean()) / (0.6745 * math.sqrt(36))


QUALITY = Filter(
    name="quality",
    version=2,
    columns={
        "clarity": (float, f"variance of the Laplacian at {SIDE} pixels: below 4..10 blurred, flat designs excepted"),
        "brightness": (float, "mean grey level, 0..1"),
        "dark": (float, f"share of pixels of at most {DARK} of 255"),
        "bright": (float, f"share of pixels of at least {BRIGHT} of 255"),
        "noise": (float, "standard deviation of noise, in grey levels of 255"),
    },
    score=score,
)
