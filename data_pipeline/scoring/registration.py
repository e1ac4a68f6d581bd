"""Registers two thumbnails that overlap, such as a crop and its original, or two frames of a burst.

A shift and a scale along each axis map one thumbnail onto the other. Gauss-Newton iterations estimate them together
with a gain and an offset of brightness (Lucas and Kanade, 1981). Thumbnails are smoothed first, because interpolation
between cells needs smooth images.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

MIN_OVERLAP = 0.6  # share of each image that the other must show
_SCALES, _SHIFT = (0.75, 1.34), 0.3  # bounds of the search
_COARSE_STEPS, _FINE_STEPS, _MAX_STEP = 6, 2, 0.06
SMOOTHINGS = 2  # times that luma is smoothed, which spreads a cell over about two on each side
_EDGE = 3  # fine cells along the border, which smoothing and resampling make unreliable


@dataclass(frozen=True)
class Mapping:
    """Maps positions 0..1 along each axis of one image to positions in another: `start + scale * position`."""

    start: Float[np.ndarray, "p 2"]
    scale: Float[np.ndarray, "p 2"]

    @property
    def overlap(self) -> Float[np.ndarray, " p"]:
        """Share of each image that the other shows; the smaller of the two."""
        shown = np.minimum(self.start + self.scale, 1) - np.maximum(self.start, 0)  # in positions of the other image
        return np.maximum(shown, 0).prod(1) / np.maximum(self.scale.prod(1), 1)

    def inverse(self) -> "Mapping":
        return Mapping(-self.start / self.scale, 1 / self.scale)

    def where(self, choose: Bool[np.ndarray, " p"], other: "Mapping") -> "Mapping":
        """This mapping for the chosen pairs, and the other mapping for the rest."""
        chosen = choose[:, None]
        return Mapping(np.where(chosen, self.start, other.start), np.where(chosen, self.scale, other.scale))


def register(one: Float[np.ndarray, "p s s"], other: Float[np.ndarray, "p s s"]) -> Mapping:
    """The mapping from positions in `other` to positions in `one` that minimises their difference.

    Args:
      one, other: luma of thumbnails; s is even.
    """
    half_one, half_other = (_smooth(_halved(image)) for image in (one, other))
    identity = Mapping(np.zeros((len(one), 2)), np.ones((len(one), 2)))
    mapping = _refine(half_one, half_other, identity, _COARSE_STEPS)
    return _refine(one, other, mapping, _FINE_STEPS)


def aligned(
    one: Float[np.ndarray, "p s s"], other: Float[np.ndarray, "p s s"], mapping: Mapping
) -> tuple[Float[np.ndarray, "p s s"], Bool[np.ndarray, "p s s"]]:
    """`one` resampled at the cells of `other`, and which cells both show, except those near a border of either."""
    side = one.shape[1]
    (rows, columns), (seen_rows, seen_columns) = zip(
        *(_sampling(mapping.start[:, axis], mapping.scale[:, axis], side, _EDGE * side / 64) for axis in (0, 1)),
        strict=True,
    )
    return rows @ one @ columns.transpose(0, 2, 1), seen_rows[:, :, None] & seen_columns[:, None, :]


def smooth(image: Float[np.ndarray, "p s s"], times: int) -> Float[np.ndarray, "p s s"]:
    """Smooths thumbnails for registration and comparison."""
    for _ in range(times):
        image = _smooth(image)
    return image


def as_magnified(other: Float[np.ndarray, "p s s"], mapping: Mapping) -> Float[np.ndarray, "p s s"]:
    """Smooths `other` as much as the aligned `one`, in which alignment magnifies the smoothing.

    Smoothing spreads a cell with a variance of about 1 along each axis, and `_smooth` adds a half.
    """
    share = np.clip(2 * (1 / np.maximum(mapping.scale.prod(1), 0.5) - 1), 0, 1).astype(np.float32)[:, None, None]
    return (1 - share) * other + share * _smooth(other)


def _smooth(image: Float[np.ndarray, "p s s"]) -> Float[np.ndarray, "p s s"]:
    """Averages every cell with its neighbours: weights 1, 2, 1 along each axis."""
    rows = np.pad(image, ((0, 0), (1, 1), (0, 0)), mode="edge")
    image = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    columns = np.pad(image, ((0, 0), (0, 0), (1, 1)), mode="edge")
    return (columns[:, :, :-2] + 2 * columns[:, :, 1:-1] + columns[:, :, 2:]) / 4


def _halved(image: Float[np.ndarray, "p s s"]) -> Float[np.ndarray, "p t t"]:
    rows = image[:, 0::2] + image[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) / 4


def _sampling(
    start: Float[np.ndarray, " p"], scale: Float[np.ndarray, " p"], side: int, edge: float
) -> tuple[Float[np.ndarray, "p s s"], Bool[np.ndarray, "p s"]]:
    """Weights of Catmull-Rom interpolation along an axis, and which cells lie `edge` inside both images."""
    centre = np.arange(side) + 0.5
    place = start[:, None] * side + scale[:, None] * centre  # in cells of the sampled image
    seen = (place >= edge) & (place <= side - edge) & (centre >= edge) & (centre <= side - edge)
    first = np.floor(place - 0.5)
    t = (place - 0.5 - first).astype(np.float32)
    taps = (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    weights = np.zeros((len(start), side, side), np.float32)
    pair, cell = np.ogrid[: len(start), :side]
    for offset, tap in enumerate(taps, start=-1):
        weights[pair, cell, np.clip(first + offset, 0, side - 1).astype(np.int64)] += tap
    return weights, seen


def _refine(
    one: Float[np.ndarray, "p s s"], other: Float[np.ndarray, "p s s"], mapping: Mapping, steps: int
) -> Mapping:
    """Gauss-Newton steps towards `other = gain * (one at mapped positions) + offset`, over cells that both show."""
    side = one.shape[1]
    down, across = np.gradient(one, axis=1) * side, np.gradient(one, axis=2) * side
    place = ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)
    for _ in range(steps):
        resampled, seen = aligned(one, other, mapping)
        slope_down, slope_across = (aligned(slope, other, mapping)[0] for slope in (down, across))
        jacobian = np.stack(
            [
                slope_down,
                slope_across,
                slope_down * place[:, None],
                slope_across * place,
                resampled - 128,
                np.ones_like(resampled),
            ],
            axis=1,
        ).reshape(len(one), 6, side * side)
        weighted = jacobian * seen.reshape(len(one), 1, -1)
        normal = (weighted @ jacobian.transpose(0, 2, 1)).astype(np.float64) + 1e-2 * np.eye(6)
        residual = (other - resampled).reshape(len(one), -1, 1)
        step = np.linalg.solve(normal, (weighted @ residual).astype(np.float64))[..., 0]
        gain = np.clip(1 + step[:, 4:5], 0.4, 2.5)
        moved = np.clip(step[:, :4] / gain, -_MAX_STEP, _MAX_STEP)
        start = mapping.start + moved[:, :2] - moved[:, 2:] / 2
        mapping = Mapping(np.clip(start, -_SHIFT, _SHIFT), np.clip(mapping.scale + moved[:, 2:], *_SCALES))
    return mapping
