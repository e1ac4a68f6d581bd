"""Places of crops that keep lines of text whole.

Dims: `n` lines; boxes are left, top, right, bottom in pixels.
"""

import numpy as np
from jaxtyping import Bool, Int

SAMPLED = 32  # random places that are tried before all places are compared


def draw_corner(
    lines_n4: Int[np.ndarray, "n 4"],
    image: tuple[int, int],
    crop: tuple[int, int],
    rng: np.random.Generator,
    step: int = 1,
) -> tuple[int, int]:
    """The top left corner (top, left) of a random crop that cuts no line and shows one.

    If no place shows a line without cutting another, the crop shows none; if every place cuts lines, it cuts the
    fewest. Among places that are equally good, all are equally likely. A line that is longer than the crop does not fit
    in any: it counts as cut only if the crop ends within its height, which slices its letters.

    Args:
      lines_n4: boxes of the lines, at least one.
      image: height and width of the image.
      crop: height and width of the crop.
      rng: source of the randomness.
      step: number of pixels of which top and left are multiples.
    """
    places = image[0] - crop[0] + 1, image[1] - crop[1] + 1
    corners_k2 = np.stack([step * rng.integers(0, -(-count // step), SAMPLED) for count in places], axis=-1)
    shown, whole = _seen(lines_n4, crop)
    at_k = [_inside(corners_k2[:, None], seen) for seen in (shown, whole)]
    good_k = (at_k[0] == at_k[1]).all(1) & at_k[1].any(1)
    if good_k.any():
        top, left = corners_k2[int(good_k.argmax())]
        return int(top), int(left)
    num_shown, num_whole = (_count(seen, places)[::step, ::step] for seen in (shown, whole))
    cut = num_shown - num_whole
    best = (cut == 0) & (num_whole > 0)
    if not best.any():
        best = cut == cut.min()
    chosen = np.flatnonzero(best)
    row, column = divmod(int(chosen[rng.integers(len(chosen))]), cut.shape[1])
    return step * row, step * column


def _seen(
    lines_n4: Int[np.ndarray, "n 4"], crop: tuple[int, int]
) -> tuple[Int[np.ndarray, "n 2 2"], Int[np.ndarray, "n 2 2"]]:
    """For each line, the ranges (first, last) of the crop's top and left that show some of it, and all of it.

    In a dim in which a line is longer than the crop, some of it is as good as all.
    """
    low_n2, high_n2 = lines_n4[:, [1, 0]], lines_n4[:, [3, 2]]
    sides = np.asarray(crop)
    shown = np.stack([low_n2 - sides + 1, high_n2 - 1], axis=-1)
    whole = np.stack([high_n2 - sides, low_n2], axis=-1)
    fits_n2 = high_n2 - low_n2 <= sides
    return shown, np.where(fits_n2[..., None], whole, shown)


def _inside(corners: Int[np.ndarray, "k 1 2"], ranges: Int[np.ndarray, "n 2 2"]) -> Bool[np.ndarray, "k n"]:
    """Whether the ranges contain the corners."""
    return np.all((ranges[..., 0] <= corners) & (corners <= ranges[..., 1]), axis=-1)


def _count(ranges: Int[np.ndarray, "n 2 2"], places: tuple[int, int]) -> Int[np.ndarray, "rows columns"]:
    """The number of ranges that contain each corner."""
    steps = np.zeros((places[0] + 1, places[1] + 1), np.int16)
    first = np.maximum(ranges[..., 0], 0)
    end = np.minimum(ranges[..., 1] + 1, places)
    for (top, left), (bottom, right) in zip(first, end, strict=True):
        if top < bottom and left < right:
            steps[top, left] += 1
            steps[bottom, left] -= 1
            steps[top, right] -= 1
            steps[bottom, right] += 1
    return steps.cumsum(0, dtype=np.int16).cumsum(1, dtype=np.int16)[:-1, :-1]
