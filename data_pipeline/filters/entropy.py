"""Entropy: images that are empty, and images that are only noise.

The entropy of the grey levels alone separates neither, as its bits show:

    one word on white    0.02, less than most flat drawings
    page of text         0.1 to 1.6
    photograph           7.6
    noise                7.7
    gradient             8.0

Further columns decide:

- `edges` separates a page of text (0.0009 and more) from an empty one (0).
- `colour_bits` and `colour_edges` detect shapes of equal luma, which are invisible in grey levels.
- `roughness` separates noise (0.9 to 1.4) from photographs, grass and gravel included (at most 0.53), from text (at
  most 0.52), and from dithered or screened pages (at most 0.8). Dither is as rough as noise, but a few scales down its
  dots average out to an ordinary image, while noise stays noise.

The figures were measured on the photographs of scikit-image, rendered and dithered pages, and noise that was blurred,
enlarged, dithered or compressed as JPEG (`tests/benchmarks/filter_fairness.py`).

Dims: `H` height, `W` width, both of the preview or of a reduced scale of it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold

EDGE = 24  # levels between neighbours
WINDOW = 1024  # pixels per side of the central part in which edges and roughness are measured
COLOUR_SIDE = 256  # pixels of the longer side to which colour is reduced, as JPEG samples it coarsely
FINE_SCALES = (0, 1, 2)  # 1, 1/2, 1/4: enlarged or blurred noise is noise again at a smaller scale
COARSE_SCALES = (2, 3)  # 1/4, 1/8: dots of dither and screens have averaged out
SPARSE_BITS, SPARSE_EDGES = 1.5, 0.05  # below these, rough points such as stars lie on an even ground
_MIN_SIDE = 12  # pixels below which a coarse scale is not measured
_GREY_VARIANCE = 16.0  # below this, roughness is measured on the channel that varies most, which may be colour


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `ENTROPY` for each candidate."""
    return [_score(candidate.target.preview, candidate.target.preview_grey) for candidate in candidates]


def _score(preview: Image.Image, preview_grey: Image.Image) -> dict:
    grey = np.asarray(preview_grey)
    window = _window(grey)
    colours = [np.asarray(channel) for channel in _reduced(preview).convert("YCbCr").split()[1:]]
    rough = window
    if _variance(window[::2].astype(np.int16)) < _GREY_VARIANCE:
        channels = [_window(np.asarray(channel)) for channel in preview.convert("YCbCr").split()]
        rough = max(channels, key=lambda channel: _variance(channel[::2].astype(np.int16)))
    return {
        "bits": _bits(grey[::2]),
        "edges": round(_edges(window), 6),
        "colour_bits": max(map(_bits, colours)),
        "colour_edges": round(max(map(_edges, colours)), 6),
        "roughness": round(_roughness(rough.astype(np.int16)), 4),
    }


def _reduced(image: Image.Image) -> Image.Image:
    factor = max(image.size) // COLOUR_SIDE
    return image.reduce(factor) if factor > 1 else image


def _window(pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "h w"]:
    top, left = (max(0, (size - WINDOW) // 2) for size in pixels.shape)
    return pixels[top : top + WINDOW, left : left + WINDOW]


def _bits(pixels: UInt8[np.ndarray, "H W"]) -> float:
    histogram = np.asarray(Image.fromarray(pixels).histogram(), dtype=np.float64)
    shares = histogram[histogram > 0] / histogram.sum()
    return round(float(-np.sum(shares * np.log2(shares))), 4) + 0.0  # + 0.0: no negative zero


def _edges(pixels: UInt8[np.ndarray, "H W"]) -> float:
    """Share of pixels that differ from the right or lower neighbour by `EDGE` levels, in every second row."""
    if min(pixels.shape) < 2:
        return 0.0
    here, right, below = pixels[:-1:2, :-1], pixels[:-1:2, 1:], pixels[1::2, :-1]
    # Unsigned byte differences take a quarter of the time of wider types.
    right, below = (np.maximum(here, there) - np.minimum(here, there) for there in (right, below))
    return np.count_nonzero(np.maximum(right, below) >= EDGE) / here.size


def _roughness(pixels: Integer[np.ndarray, "H W"]) -> float:
    """The largest ratio at the fine scales, capped by the smallest at the coarse scales; see `_ratios`.

    It is 0 for an image that is less than 3 pixels wide or high, or that has a single level.
    """
    ratios = dict(_ratios(pixels))
    fine = max((ratio for scale, ratio in ratios.items() if scale in FINE_SCALES), default=0.0)
    coarse = min((ratio for scale, ratio in ratios.items() if scale in COARSE_SCALES), default=fine)
    return min(fine, coarse)


def _ratios(pixels: Integer[np.ndarray, "H W"]) -> Iterator[tuple[int, float]]:
    """Yields (scale, ratio) for every scale that is large enough; a fine scale with a single level is skipped.

    The ratio is the variance of (pixel - mean of its four neighbours), divided by the variance of the image; it is 1.25
    for white noise. It is computed from every second row.
    """
    for scale in range(max(COARSE_SCALES) + 1):  # pixels are sums of 4 ** scale levels; 16 bits suffice for 32 * 255
        if min(pixels.shape) < (3 if scale in FINE_SCALES else _MIN_SIDE):
            return
        if 4**scale > 32:
            pixels = pixels.astype(np.int32)
        around = pixels[:-2:2, 1:-1] + pixels[2::2, 1:-1] + pixels[1:-1:2, :-2] + pixels[1:-1:2, 2:]
        variance = _variance(pixels[::2])
        if variance <= 1e-3 * 16**scale:
            if scale in COARSE_SCALES:  # stripes and dots have averaged out, which noise never does
                yield scale, 0.0
        else:
            yield scale, _variance(4 * pixels[1:-1:2, 1:-1] - around) / 16 / variance
        H, W = (size // 2 * 2 for size in pixels.shape)
        rows = pixels[0:H:2, :W] + pixels[1:H:2, :W]
        pixels = rows[:, 0::2] + rows[:, 1::2]


def _variance(values: Integer[np.ndarray, "H W"]) -> float:
    """Variance of integers that double precision represents exactly, so it is the same on every machine."""
    exact = values.astype(np.float64)
    mean = exact.sum() / exact.size
    return float(np.square(exact, out=exact).sum() / exact.size - mean**2)


def _drops(row: Row, settings: Settings) -> str | None:
    plain = (row[f"entropy.{name}bits"] < settings.min_bits for name in ("", "colour_"))
    smooth = (row[f"entropy.{name}edges"] < settings.min_edges for name in ("", "colour_"))
    if all((*plain, *smooth)):
        return "empty"
    few_levels = max(row["entropy.bits"], row["entropy.colour_bits"]) < SPARSE_BITS
    sparse = few_levels and row["entropy.edges"] < SPARSE_EDGES
    return "noise" if row["entropy.roughness"] > settings.max_roughness and not sparse else None


ENTROPY = Filter(
    name="entropy",
    version=4,
    columns={
        "bits": (float, "Shannon entropy of the grey-level histogram: 0 for a solid colour, 4..8 for photographs"),
        "edges": (float, f"share of pixels that differ from a neighbour by {EDGE} of 255 grey levels"),
        "colour_bits": (float, "larger entropy of the two colour channels (Cb, Cr)"),
        "colour_edges": (float, "`edges` of the colour channels of the reduced image"),
        "roughness": (float, "how little a pixel's neighbours predict it, ignoring print dots: 1.25 for white noise"),
    },
    score=score,
    thresholds=(
        Threshold(
            "min_bits",
            1.0,
            "bits; an image is empty if grey levels and colours have less entropy, and fewer edges than `min_edges`",
            low=0,
            high=8,
            column="bits",
            reason="empty",
        ),
        Threshold(
            "min_edges",
            0.0005,
            "share of pixels on an edge, see `min_bits`",
            low=0,
            high=1,
            column="edges",
            reason="empty",
        ),
        Threshold(
            "max_roughness",
            0.8,
            "roughness above which an image is noise",
            low=0,
            high=2,
            column="roughness",
            keeps="below",
            reason="noise",
        ),
    ),
    drops=_drops,
)
