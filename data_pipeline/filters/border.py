"""Borders: bars and frames of one colour around an image, which a model would learn to draw.

The plain background of a product also has rows and columns of one colour. It differs from a frame in its inner edge: a
photograph fills its frame up to the corners, while a product touches its bounding box only in places. Bars therefore
count only if their inner edges are straight up to the ends. `straight` is 0.7 to 1 for photographs in white and black
frames, and at most 0.1 for products with round outlines. Of 65 stamps of tuxpaint on white, 4 still count as framed,
since a rectangular box on a plain background looks like a framed image.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipeline.filters.base import Candidate, Exemption, Filter, Row, Settings, Threshold, reduce_to_side
from data_pipeline.filters.exemptions import DESIGN, FLAT

SIDE = 512  # pixels of the longer side to which images are reduced, so that borders of a few pixels vanish
TOLERANCE = 6  # grey levels of 255 by which a border may vary, because of JPEG compression
DEPTH = 2  # rows behind a bar that may contain its inner edge
END = 16  # the ends of an inner edge are its first and last sixteenth
MIN_STRAIGHT = 0.25  # `straight` from which the inner edges count as straight


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `BORDER` for each candidate."""
    return [_score(reduce_to_side(candidate.target.preview_grey, SIDE)) for candidate in candidates]


def _score(grey: Image.Image) -> dict:
    pixels = np.asarray(grey)
    top, bottom = _bars(_uniform_rows(pixels))
    left, right = _bars(_uniform_rows(np.ascontiguousarray(pixels.T)))
    H, W = pixels.shape
    straight = (
        _straight_ends(pixels[:, left : W - right], (top, bottom)),
        _straight_ends(pixels[top : H - bottom].T, (left, right)),
    )
    ends = [*straight[0], *straight[1]]
    share = float(np.mean(ends)) if ends else 0.0
    inside = max(0, H - top - bottom) * max(0, W - left - right)
    sides = [top / H, bottom / H, left / W, right / W]
    framed = share >= MIN_STRAIGHT
    return {
        "top": round(sides[0], 4),
        "bottom": round(sides[1], 4),
        "left": round(sides[2], 4),
        "right": round(sides[3], 4),
        "straight": round(share, 4),
        "bars": framed * sum(pair > 0.02 for pair in (min(sides[:2]), min(sides[2:]))),
        "area": round(framed * (1 - inside / (H * W)), 4),
    }


def _straight_ends(pixels: UInt8[np.ndarray, "n w"], bars: tuple[int, int]) -> list[float]:
    """Shares of pixels that differ from the bar, for both ends of the inner edges of the top and bottom bars.

    Args:
      pixels: image without the bars at its left and right.
      bars: heights of the top and bottom bars in rows; a bar of height 0 has no inner edge.
    """
    shares = []
    for rows, bar in zip((pixels, pixels[::-1]), bars, strict=True):
        if bar:
            behind = rows[bar : bar + DEPTH].astype(np.int16)
            differs = (np.abs(behind - np.median(rows[0])) > TOLERANCE).any(axis=0)
            end = max(1, len(differs) // END)
            shares += [float(differs[:end].mean()), float(differs[-end:].mean())]
    return shares


def _uniform_rows(pixels: UInt8[np.ndarray, "n w"]) -> Bool[np.ndarray, " n"]:
    """Which rows have a single level that is also that of the first or the last row."""
    ends = np.median(pixels[[0, -1]], axis=1)
    flat = pixels.max(axis=1) - pixels.min(axis=1) <= 2 * TOLERANCE
    uniform = np.zeros(len(pixels), bool)
    if flat.any():
        rows = pixels[flat].astype(np.int16)
        levels = np.median(rows, axis=1)
        near_ends = np.abs(levels[:, None] - ends).min(axis=1) <= TOLERANCE
        uniform[flat] = (np.abs(rows - levels[:, None]).max(axis=1) <= TOLERANCE) & near_ends
    return uniform


def _bars(uniform: Bool[np.ndarray, " n"]) -> tuple[int, int]:
    """Lengths of the runs at both ends; 0 for an image that is uniform throughout."""
    if uniform.all():
        return 0, 0
    return int(np.argmin(uniform)), int(np.argmin(uniform[::-1]))


def _has_no_bars(row: Row, settings: Settings) -> bool:
    return not row["border.bars"]


_NO_BARS = Exemption("images without two opposite straight bars", _has_no_bars)

BORDER = Filter(
    name="border",
    version=3,
    columns={
        "top": (float, "height of the bar at the top, as a share of the image"),
        "bottom": (float, "height of the bar at the bottom"),
        "left": (float, "width of the bar at the left, as a share of the image"),
        "right": (float, "width of the bar at the right"),
        "straight": (float, f"share of the inner edges' ends that are straight; below {MIN_STRAIGHT}: no frame"),
        "bars": (int, "pairs of opposite straight bars above 2%: 1: letterbox or pillarbox, 2: frame"),
        "area": (float, "share of the image that straight bars cover"),
    },
    score=score,
    thresholds=(
        Threshold(
            "max_border",
            1.0,
            "share of the image that straight bars on opposite sides cover",
            low=0,
            high=1,
            column="area",
            keeps="below",
            reason="border",
            exempt=(_NO_BARS, FLAT, DESIGN),
        ),
    ),
)
