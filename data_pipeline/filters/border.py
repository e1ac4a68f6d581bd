"""Borders: bars and frames of one colour around the picture, which a model would learn to draw."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter, within

SIDE = 512  # the picture is reduced to it: a border of a few pixels is none
TOLERANCE = 6  # grey levels of 255 by which a border may vary, as JPEG makes it


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `BORDER` for each candidate."""
    return [_score(within(candidate.whole.preview_grey, SIDE)) for candidate in candidates]


def _score(grey: Image.Image) -> dict:
    pixels = np.asarray(grey)
    top, bottom = _bars(_uniform(pixels))
    left, right = _bars(_uniform(np.ascontiguousarray(pixels.T)))
    H, W = pixels.shape
    inside = max(0, H - top - bottom) * max(0, W - left - right)
    sides = [top / H, bottom / H, left / W, right / W]
    return {
        "top": round(sides[0], 4),
        "bottom": round(sides[1], 4),
        "left": round(sides[2], 4),
        "right": round(sides[3], 4),
        "bars": sum(pair > 0.02 for pair in (min(sides[:2]), min(sides[2:]))),
        "area": round(1 - inside / (H * W), 4),
    }


def _uniform(pixels: UInt8[np.ndarray, "n w"]) -> Bool[np.ndarray, " n"]:
    """Which rows are of one level, and of that of the first or the last row."""
    ends = np.median(pixels[[0, -1]], axis=1)
    flat = pixels.max(axis=1) - pixels.min(axis=1) <= 2 * TOLERANCE
    found = np.zeros(len(pixels), bool)
    if flat.any():
        rows = pixels[flat].astype(np.int16)
        levels = np.median(rows, axis=1)
        near_ends = np.abs(levels[:, None] - ends).min(axis=1) <= TOLERANCE
        found[flat] = (np.abs(rows - levels[:, None]).max(axis=1) <= TOLERANCE) & near_ends
    return found


def _bars(uniform: Bool[np.ndarray, " n"]) -> tuple[int, int]:
    """Length of the runs at both ends; a picture without content has none."""
    if uniform.all():
        return 0, 0
    return int(np.argmin(uniform)), int(np.argmin(uniform[::-1]))


BORDER = Filter(
    name="border",
    version=2,
    columns={
        "top": (float, "height of the bar at the top, as a share of the picture's"),
        "bottom": (float, "of the bar at the bottom"),
        "left": (float, "width of the bar at the left, as a share of the picture's"),
        "right": (float, "of the bar at the right"),
        "bars": (int, "pairs of opposite bars above 2%: 1 letterbox or pillarbox, 2 a frame"),
        "area": (float, "share of the picture that all bars take"),
    },
    score=score,
)
