"""Edit pairs: whether source and target show the same scene in place, how much changes, and whether the rest stays.

What is right depends on the edit: a change of style touches every pixel, a change of one word must leave the others
alone. So everything is a column, and the thresholds apply to classes of edits, which their tags name:

| tag               | the target must                                                                     |
| ----------------- | ----------------------------------------------------------------------------------- |
| `edit/local`      | show the source's scene, in its place, changed in some part and equal in the rest   |
| `edit/global`     | show the source's scene, in its place, changed anywhere                             |
| `edit/background` | have the source's shape                                                             |
| `edit/compose`    | have instructions that name all of several sources (`instruction`)                  |
| none of these     | differ from its source, since nothing more is known                                 |

The target is compared with the source that it resembles most, resized to the target.

- `shared` detects another scene. Both images are reduced to `SIDE`, and structure coarser than `COARSE` pixels is
  removed, because skies and floors look alike everywhere. Every textured block of the target is then correlated with
  the block of the source in the same place. Normalised correlation ignores brightness and contrast, and nearly ignores
  blur, noise and rain. The share of correlated blocks is robust: a local edit leaves all other blocks.
- `shift` is the peak of the phase correlation (Kuglin and Hines, 1975), or of the plain correlation, which blurred
  images need. It counts only if it makes the images differ less than without it.
- `changed` is the share of the blocks, on a grid of `GRID`, that differ more than compression explains.
- `unchanged_psnr` is measured on the other textured blocks. It uses the upper quartile of their errors, which damage
  to the whole image raises, but a soft shadow or a faint part of the edit does not.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from data_pipeline.filters.base import Candidate, Chosen, Filter, Row, Threshold
from qi2_jax.pixels import over_white

SIDE, BLOCK, COARSE = 256, 16, 8
MAX_SIDE = 2048  # pixels to which larger images are reduced before the comparison, to bound the memory
GRID, CHANGED = 64, 24.0  # blocks of the longer side; root of the mean squared difference, in levels of 255
TEXTURED = 2.0  # standard deviation in grey levels from which a block is textured
FOUND = 0.6  # correlation from which a block is shared; 1 in 100 unrelated blocks reaches it
CLOSER, MAX_SHIFT = 0.9, 0.4  # share to which a shift must reduce the difference; largest share of the sides
MAX_PSNR = 99.0
MIN_UNCHANGED = 16  # textured blocks outside of the change, below which there is no score


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `EDIT_PAIR` for each candidate; all None for an image-text pair."""
    return [_score(candidate) if candidate.conditions else dict.fromkeys(COLUMNS) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    target, *sources = (over_white(image) for image in candidate.images)
    small = _fit(target.size, SIDE)
    fine = _fine(target, small)
    registered = [_register(_fine(source, small), fine) for source in sources]
    base = max(range(len(sources)), key=lambda place: (registered[place][0] or 0.0, -place))
    source = sources[base]
    shared, shift = registered[base]
    size = _fit(target.size, MAX_SIDE)
    before, after = (np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in (source, target))
    changed, unchanged_psnr = _compare(before, after)
    aspects = source.width / source.height, target.width / target.height
    return {
        "base": base + 1,
        "aspect": round(max(aspects) / min(aspects), 4),
        "scale": round((target.width * target.height / (source.width * source.height)) ** 0.5, 4),
        "shared": shared,
        "shift": shift,
        "changed": changed,
        "difference": round(float(np.abs(before.astype(np.int16) - after).mean()), 4),
        "unchanged_psnr": unchanged_psnr,
        "repeated_source": len({(image.size, image.tobytes()) for image in sources}) < len(sources),
    }


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    factor = min(1.0, side / max(size))
    width, height = (max(1, round(length * factor)) for length in size)
    return width, height


def _fine(image: Image.Image, size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Grey levels of the reduced image without its coarse structure."""
    grey = image.convert("L").resize(size, Image.Resampling.BOX)
    coarse = grey.filter(ImageFilter.GaussianBlur(COARSE))
    return np.asarray(grey, np.float32) - np.asarray(coarse, np.float32)


def _register(source: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]) -> tuple[float | None, float | None]:
    """(shared, shift as a share of the longer side) of two images of equal size; None if the target is flat."""
    H, W = target.shape
    window = np.hanning(H + 2)[1:-1, None] * np.hanning(W + 2)[None, 1:-1]
    spectrum = np.fft.rfft2(target * window) * np.conj(np.fft.rfft2(source * window))
    size = np.abs(spectrum)
    best, closest = (0.0, 0.0), CLOSER * _differ(source, target)
    for weighted in (spectrum / np.maximum(size, 1e-9), spectrum / np.sqrt(np.maximum(size, 1e-9)), spectrum):
        peaks = np.fft.irfft2(weighted, s=target.shape)
        row, column = np.unravel_index(int(np.argmax(peaks)), peaks.shape)
        dy, dx = _between(peaks[:, column], int(row)), _between(peaks[row], int(column))
        if (round(dy), round(dx)) != (0, 0) and max(abs(dy) / H, abs(dx) / W) < MAX_SHIFT:
            difference = _differ(*_overlap(source, target, round(dy), round(dx)))
            if difference < closest:
                best, closest = (dy, dx), difference
    shared = _shared(*_overlap(source, target, round(best[0]), round(best[1])))
    return shared, None if shared is None else round(float(np.hypot(*best)) / max(H, W), 5)


def _between(line: Float[np.ndarray, " n"], peak: int) -> float:
    """Sub-sample position of a peak on a circle, from the parabola through three samples; -n/2..n/2."""
    n = len(line)
    left, top, right = line[(peak - 1) % n], line[peak], line[(peak + 1) % n]
    bend = left - 2 * top + right
    place = peak + (0.5 * float(left - right) / float(bend) if bend < 0 else 0.0)
    return place - n if place > n / 2 else place


def _overlap(source: np.ndarray, target: np.ndarray, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """The overlap of both images if the target is the source moved down by dy and right by dx."""
    H, W = target.shape
    rows, columns = slice(max(0, dy), H + min(0, dy)), slice(max(0, dx), W + min(0, dx))
    moved_rows, moved_columns = slice(max(0, -dy), H + min(0, -dy)), slice(max(0, -dx), W + min(0, -dx))
    return source[moved_rows, moved_columns], target[rows, columns]


def _differ(source: np.ndarray, target: np.ndarray) -> float:
    return float(np.abs(source - target).mean())


def _shared(source: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]) -> float | None:
    H, W = (size // BLOCK * BLOCK for size in target.shape)
    one, other = (
        image[:H, :W].reshape(H // BLOCK, BLOCK, W // BLOCK, BLOCK).swapaxes(1, 2).reshape(-1, BLOCK**2)
        for image in (source, target)
    )
    one, other = (blocks - blocks.mean(1, keepdims=True) for blocks in (one, other))
    spread, other_spread = one.std(1), other.std(1)
    textured = other_spread >= TEXTURED
    if not textured.any():
        return None
    correlation = (one * other).mean(1) / np.maximum(spread * other_spread, 1e-6)
    return round(float(np.mean(correlation[textured] >= FOUND)), 4)


def _compare(before: UInt8[np.ndarray, "H W 3"], after: UInt8[np.ndarray, "H W 3"]) -> tuple[float, float | None]:
    """(changed, unchanged_psnr), as explained above."""
    size = _fit((after.shape[1], after.shape[0]), GRID)

    def blocks(pixels: np.ndarray) -> Float[np.ndarray, "h w"]:
        return np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BOX))

    errors = blocks(np.mean((before.astype(np.float32) - after) ** 2, axis=2))
    grey = after.mean(axis=2, dtype=np.float32)
    textured = blocks(grey**2) - blocks(grey) ** 2 >= TEXTURED**2
    changed = errors >= CHANGED**2
    near = np.asarray(Image.fromarray(changed).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
    left = errors[textured & ~near]
    if len(left) < MIN_UNCHANGED:
        return round(float(changed.mean()), 6), None
    error = float(np.quantile(left, 0.75))
    psnr = MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / error))
    return round(float(changed.mean()), 6), round(psnr, 3)


COLUMNS = {
    "base": (int, "number, from 1, of the source that the target resembles most; the others are not compared"),
    "aspect": (float, "ratio of the aspects of source and target, >= 1; 1.02 is a pixel or two of rounding"),
    "scale": (float, "side of the target over that of the source"),
    "shared": (
        float,
        "share of the target's textured blocks that the source shows in the same place; other scenes: 0.02",
    ),
    "shift": (float, "shift of the target, as a share of the longer side; None: too flat"),
    "changed": (float, "share of the image that differs more than compression explains"),
    "difference": (float, "mean difference over all pixels and channels, in levels of 255"),
    "unchanged_psnr": (
        float,
        "PSNR in decibels away from the change; 99: equal; None: everything changes, or the rest is flat",
    ),
    "repeated_source": (bool, "whether two of the sources are equal"),
}


def _drops(row: Row, chosen: Chosen) -> str | None:
    if not row["description.conditions"]:
        return None
    local, whole, ground = (f"edit/{name}" in row["description.tags"] for name in ("local", "global", "background"))
    pair = {name: row[f"edit_pair.{name}"] for name in COLUMNS}
    if pair["changed"] < chosen.min_changed and (local or pair["difference"] < chosen.min_difference):
        return "nothing_changes"
    if pair["repeated_source"]:
        return "repeated_source"
    if (local or whole or ground) and pair["aspect"] > chosen.max_edit_aspect:
        return "other_shape"
    if (local or whole) and pair["shared"] is not None:
        if pair["shared"] < chosen.min_shared:
            return "other_scene"
        if pair["shift"] > chosen.max_shift:
            return "shifted"
    if local and pair["changed"] > chosen.max_changed:
        return "everything_changes"
    psnr = pair["unchanged_psnr"]
    return "unchanged_region_differs" if local and psnr is not None and psnr < chosen.min_unchanged_psnr else None


EDIT_PAIR = Filter(
    name="edit_pair",
    version=2,
    columns=COLUMNS,
    score=score,
    thresholds=(
        Threshold(
            "max_edit_aspect",
            1.03,
            "ratio of the aspects of source and target of local, global and background edits",
            low=1,
            high=1e6,
            column="aspect",
            keeps="below",
            reason="other_shape",
        ),
        Threshold(
            "min_shared",
            0.2,
            "share of the target's blocks that the source shows too, of local and global edits",
            low=0,
            high=1,
            column="shared",
            reason="other_scene",
        ),
        Threshold(
            "max_shift",
            0.004,
            "shift of the target of local and global edits, as a share of its longer side",
            low=0,
            high=1,
            column="shift",
            keeps="below",
            reason="shifted",
        ),
        Threshold(
            "min_changed",
            0.0005,
            "share of the image that an edit changes strongly",
            low=0,
            high=1,
            column="changed",
            logarithmic=True,
            reason="nothing_changes",
        ),
        Threshold(
            "max_changed",
            0.7,
            "share of the image that a local edit changes",
            low=0,
            high=1,
            column="changed",
            keeps="below",
            reason="everything_changes",
        ),
        Threshold(
            "min_difference",
            1.0,
            "mean change in grey levels that any but a local edit may show instead of `min_changed`",
            low=0,
            high=255,
            column="difference",
            logarithmic=True,
            reason="nothing_changes",
        ),
        Threshold(
            "min_unchanged_psnr",
            32.0,
            "decibels, of what a local edit leaves alone",
            low=0,
            high=99,
            column="unchanged_psnr",
            reason="unchanged_region_differs",
        ),
    ),
    step="edit",
    drops=_drops,
)
