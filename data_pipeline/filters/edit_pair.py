"""Edit pairs: whether source and target show the same scene in place, how much changes, and whether the rest stays.

What is right depends on the edit: a change of style touches every pixel, while a change of one word must not touch the
rest. All measurements are therefore columns, and thresholds apply to classes of edits, which tags name:

| tag               | the target must                                                                     |
| ----------------- | ----------------------------------------------------------------------------------- |
| `edit/local`      | show the source's scene in place, changed in some part and equal in the rest        |
| `edit/global`     | show the source's scene in place, changed anywhere                                  |
| `edit/background` | have the source's shape                                                             |
| `edit/compose`    | have instructions that name all of several sources (`instruction`)                  |
| none of these     | differ from its source                                                              |

The target is compared with the source that it resembles most, resized to the target.

- `shared` detects another scene. Both images are reduced to `SIDE`, and structure coarser than `COARSE` pixels is
  removed, because skies and floors look alike everywhere. Every textured block of the target is then correlated with
  the block of the source in the same place. Normalised correlation ignores brightness and contrast, and nearly ignores
  blur, noise and rain. The share of correlated blocks is robust, since a local edit does not touch the other blocks.
- `shift` is the peak of the phase correlation (Kuglin and Hines, 1975), or of the plain correlation, which blurred
  images need. It counts only if shifting makes the images differ less.
- `changed` is the share of the blocks, on a grid of `GRID`, that differ more than compression explains.
- `unchanged_psnr` is measured on the other textured blocks, from the upper quartile of their errors. Damage to the
  whole image raises this quartile; a soft shadow or a faint part of the edit does not.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from qi2_jax.pixels import over_white

SIDE, BLOCK, COARSE = 256, 16, 8
MAX_SIDE = 2048  # pixels to which larger images are reduced before the comparison, to bound the memory
GRID = 64  # blocks along the longer side
CHANGED = 24.0  # RMS difference, in levels of 255, from which a block has changed
TEXTURED = 2.0  # standard deviation in grey levels from which a block is textured
CORRELATED = 0.6  # correlation from which a block is shared; 1 in 100 unrelated blocks reaches it
SHIFT_GAIN = 0.9  # factor by which a shift must reduce the difference
MAX_SHIFT = 0.4  # largest shift, as a share of the sides
MAX_PSNR = 99.0
MIN_UNCHANGED = 16  # minimum of unchanged textured blocks for a score


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `EDIT_PAIR` for each candidate; all None for an image-text pair."""
    return [_score(candidate) if candidate.conditions else dict.fromkeys(COLUMNS) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    target, *sources = (over_white(image) for image in candidate.images)
    small = _fit(target.size, SIDE)
    fine = _without_coarse_structure(target, small)
    registered = [_register(_without_coarse_structure(source, small), fine) for source in sources]
    base = max(range(len(sources)), key=lambda place: (registered[place][0] or 0.0, -place))
    source = sources[base]
    shared, shift = registered[base]
    size = _fit(target.size, MAX_SIDE)
    before, after = (np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in (source, target))
    changed, unchanged_psnr = _measure_change(before, after)
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


def _without_coarse_structure(image: Image.Image, size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Grey levels of the reduced image, minus their blurred version."""
    grey = image.convert("L").resize(size, Image.Resampling.BOX)
    coarse = grey.filter(ImageFilter.GaussianBlur(COARSE))
    return np.asarray(grey, np.float32) - np.asarray(coarse, np.float32)


def _register(source: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]) -> tuple[float | None, float | None]:
    """Returns `shared` and `shift` of two images of equal size; both None if the target is flat."""
    H, W = target.shape
    window = np.hanning(H + 2)[1:-1, None] * np.hanning(W + 2)[None, 1:-1]
    spectrum = np.fft.rfft2(target * window) * np.conj(np.fft.rfft2(source * window))
    size = np.abs(spectrum)
    best, closest = (0.0, 0.0), SHIFT_GAIN * _mean_difference(source, target)
    for weighted in (spectrum / np.maximum(size, 1e-9), spectrum / np.sqrt(np.maximum(size, 1e-9)), spectrum):
        peaks = np.fft.irfft2(weighted, s=target.shape)
        row, column = np.unravel_index(int(np.argmax(peaks)), peaks.shape)
        dy, dx = _subpixel_peak(peaks[:, column], int(row)), _subpixel_peak(peaks[row], int(column))
        if (round(dy), round(dx)) != (0, 0) and max(abs(dy) / H, abs(dx) / W) < MAX_SHIFT:
            difference = _mean_difference(*_overlap(source, target, round(dy), round(dx)))
            if difference < closest:
                best, closest = (dy, dx), difference
    shared = _share_of_common_blocks(*_overlap(source, target, round(best[0]), round(best[1])))
    return shared, None if shared is None else round(float(np.hypot(*best)) / max(H, W), 5)


def _subpixel_peak(line: Float[np.ndarray, " n"], peak: int) -> float:
    """Position -n/2..n/2 of a peak in a periodic signal, from the parabola through three samples."""
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


def _mean_difference(source: np.ndarray, target: np.ndarray) -> float:
    return float(np.abs(source - target).mean())


def _share_of_common_blocks(source: Float[np.ndarray, "H W"], target: Float[np.ndarray, "H W"]) -> float | None:
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
    return round(float(np.mean(correlation[textured] >= CORRELATED)), 4)


def _measure_change(
    before: UInt8[np.ndarray, "H W 3"], after: UInt8[np.ndarray, "H W 3"]
) -> tuple[float, float | None]:
    """Returns `changed` and `unchanged_psnr`, see the module's docstring."""
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
    "base": (int, "number, from 1, of the source that the target resembles most; only this one is compared"),
    "aspect": (float, "ratio of the aspect ratios of source and target, >= 1; rounding of sizes gives up to 1.02"),
    "scale": (float, "side of the target over that of the source"),
    "shared": (
        float,
        "share of the target's textured blocks that the source shows in the same place; 0.02 for other scenes",
    ),
    "shift": (float, "shift of the target, as a share of the longer side; None: the target is too flat"),
    "changed": (float, "share of the image that differs more than compression explains"),
    "difference": (float, "mean difference over all pixels and channels, in levels of 255"),
    "unchanged_psnr": (
        float,
        "PSNR in decibels outside the change; 99: equal; None: everything changes, or the rest is flat",
    ),
    "repeated_source": (bool, "whether two of the sources are equal"),
}


def _drops(row: Row, settings: Settings) -> str | None:
    if not row["description.conditions"]:
        return None
    local, whole, ground = (f"edit/{name}" in row["description.tags"] for name in ("local", "global", "background"))
    pair = {name: row[f"edit_pair.{name}"] for name in COLUMNS}
    if pair["changed"] < settings.min_changed and (local or pair["difference"] < settings.min_difference):
        return "nothing_changes"
    if pair["repeated_source"]:
        return "repeated_source"
    if (local or whole or ground) and pair["aspect"] > settings.max_edit_aspect:
        return "other_shape"
    if (local or whole) and pair["shared"] is not None:
        if pair["shared"] < settings.min_shared:
            return "other_scene"
        if pair["shift"] > settings.max_shift:
            return "shifted"
    if local and pair["changed"] > settings.max_changed:
        return "everything_changes"
    psnr = pair["unchanged_psnr"]
    return "unchanged_region_differs" if local and psnr is not None and psnr < settings.min_unchanged_psnr else None


EDIT_PAIR = Filter(
    name="edit_pair",
    version=2,
    columns=COLUMNS,
    score=score,
    thresholds=(
        Threshold(
            "max_edit_aspect",
            1.03,
            "ratio of the aspect ratios of source and target in local, global and background edits",
            low=1,
            high=1e6,
            column="aspect",
            keeps="below",
            reason="other_shape",
        ),
        Threshold(
            "min_shared",
            0.2,
            "share of the target's blocks that the source shows too, in local and global edits",
            low=0,
            high=1,
            column="shared",
            reason="other_scene",
        ),
        Threshold(
            "max_shift",
            0.004,
            "shift of the target in local and global edits, as a share of its longer side",
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
            "mean change in grey levels that satisfies an edit, unless local, in place of `min_changed`",
            low=0,
            high=255,
            column="difference",
            logarithmic=True,
            reason="nothing_changes",
        ),
        Threshold(
            "min_unchanged_psnr",
            32.0,
            "PSNR in decibels outside the change of a local edit",
            low=0,
            high=99,
            column="unchanged_psnr",
            reason="unchanged_region_differs",
        ),
    ),
    step="edit",
    drops=_drops,
)
