"""Image quality: clarity, exposure and noise.

They are measured on grey levels reduced to at most `SIDE` pixels per side, so that scores of different resolutions are
comparable.

- `clarity` is the variance of the Laplacian at full exposure. Three stops darker, a scene has a sixth of the variance,
  and a bright, pale one has as little, although both are as sharp. The part due to rounding to whole levels is
  therefore subtracted, and the rest is scaled to the span of levels of a daylight photograph.
- `noise` is meaningless if every pixel is black or white, as in dithered and screened pages, line art and text.
  `two_level` measures how close an image is to this case.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int16
from PIL import Image

from data_pipeline.filters.base import Candidate, Exemption, Filter, Row, Settings, Threshold, reduce_to_side
from data_pipeline.filters.exemptions import FLAT

SIDE = 1024
DARK, BRIGHT = 8, 247  # no detail is visible up to the first grey level and from the second on
SPAN = 0.75  # share of all levels that a daylight photograph covers, from black up or from white down
OUTLIERS = 0.005  # share of the darkest and of the brightest pixels that the span ignores
MAX_GAIN = 6.0  # about three stops; beyond that, noise would count as detail
ROUNDING = 20 / 12  # variance of the Laplacian of rounding errors, which are uniform in +-1/2
TWO_LEVEL = 0.8  # value of `two_level` from which `noise` is ignored


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `QUALITY` for each candidate."""
    return [_score(candidate.target.grey) for candidate in candidates]


def _score(whole: Image.Image) -> dict:
    grey = reduce_to_side(whole, SIDE)
    levels = np.asarray(grey.histogram(), dtype=np.float64) / (grey.width * grey.height)
    pixels = np.asarray(grey).astype(np.int16)
    return {
        "clarity": round(_clarity(pixels, levels), 4),
        "brightness": round(float(levels @ np.arange(256)) / 255, 4),
        "dark": round(float(levels[: DARK + 1].sum()), 4),
        "bright": round(float(levels[BRIGHT:].sum()), 4),
        "noise": round(_noise(pixels), 4),
        "two_level": round(_two_level(whole), 4),
    }


def _clarity(pixels: Int16[np.ndarray, "H W"], levels: Float[np.ndarray, "256"]) -> float:
    below = np.cumsum(levels)
    darkest, brightest = np.searchsorted(below, (OUTLIERS, 1 - OUTLIERS))
    span = max(1, min(brightest, 255 - darkest)) / 255
    variance = _laplacian_variance(pixels)
    return max(variance, (variance - ROUNDING) * min(MAX_GAIN, (SPAN / span) ** 2))


def _two_level(grey: Image.Image) -> float:
    """Variance of the grey levels over the largest possible for their mean, which only black and white pixels reach.

    It is measured before the image is reduced, since reducing turns black and white dots into grey.
    """
    levels = np.asarray(grey.histogram(), dtype=np.float64) / (grey.width * grey.height)
    mean = float(levels @ np.arange(256))
    variance = float(levels @ np.square(np.arange(256) - mean))
    return variance / max(1e-6, mean * (255 - mean))


def _laplacian_variance(pixels: Int16[np.ndarray, "H W"]) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al., ICPR 2000)."""
    if min(pixels.shape) < 3:
        return 0.0
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return float((around - 4 * pixels[1:-1, 1:-1]).var(dtype=np.float64))


def _noise(pixels: Int16[np.ndarray, "H W"]) -> float:
    """Standard deviation of white noise (Immerkaer, CVIU 1996), estimated with the median, which is robust to edges.

    The kernel [[1, -2, 1], [-2, 4, -2], [1, -2, 1]] removes smooth structure. For white noise of deviation s its
    response is normal with deviation 6 s, so its absolute value has the median 0.6745 * 6 s.
    """
    if min(pixels.shape) < 3:
        return 0.0
    rows = pixels[:-2] - 2 * pixels[1:-1] + pixels[2:]
    response = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:])
    below = np.cumsum(np.bincount(response.ravel()))  # gives the median ten times faster than sorting
    middle = (response.size - 1) // 2, response.size // 2
    return float(np.searchsorted(below, middle, side="right").mean()) / (0.6745 * math.sqrt(36))


def _is_black_and_white(row: Row, settings: Settings) -> bool:
    return row["quality.two_level"] >= TWO_LEVEL


_BLACK_AND_WHITE = Exemption("black and white images (`two_level`)", _is_black_and_white)

QUALITY = Filter(
    name="quality",
    version=3,
    columns={
        "clarity": (float, f"variance of the Laplacian at {SIDE} pixels and full exposure; blurred below 4..10"),
        "brightness": (float, "mean grey level, 0..1"),
        "dark": (float, f"share of pixels of at most {DARK} of 255"),
        "bright": (float, f"share of pixels of at least {BRIGHT} of 255"),
        "noise": (float, "standard deviation of white noise, in grey levels of 255"),
        "two_level": (float, f"1: every pixel is black or white; `noise` is ignored from {TWO_LEVEL} on"),
    },
    score=score,
    thresholds=(
        Threshold(
            "max_noise",
            255.0,
            "standard deviation of white noise, in grey levels",
            low=0,
            high=255,
            column="noise",
            keeps="below",
            reason="noisy",
            exempt=(_BLACK_AND_WHITE,),
        ),
        Threshold(
            "min_clarity",
            0.0,
            "variance of the Laplacian at full exposure",
            low=0,
            high=1e6,
            column="clarity",
            reason="blurred",
            exempt=(FLAT,),
            logarithmic=True,
        ),
        Threshold(
            "min_brightness",
            0.0,
            "mean grey level, 0..1",
            low=0,
            high=1,
            column="brightness",
            reason="too_dark",
            exempt=(FLAT,),
        ),
        Threshold(
            "max_brightness",
            1.0,
            "mean grey level, 0..1",
            low=0,
            high=1,
            column="brightness",
            keeps="below",
            reason="too_bright",
            exempt=(FLAT,),
        ),
    ),
)
