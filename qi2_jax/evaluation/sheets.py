"""Sheets of the worst cases: original, reconstruction and their difference, side by side."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qi2_jax.evaluation.measuring import Case
from qi2_jax.reporting.grid import in_ascii, lay_out

GAIN = 4  # factor on differences
COLUMNS = ("original", "reconstruction", f"difference x{GAIN}")


def difference(a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Absolute difference of each channel, times `GAIN`, at most 255."""
    return np.minimum(np.abs(a.astype(np.int16) - b) * GAIN, 255).astype(np.uint8)


def draw(cases: Sequence[Case]) -> Image.Image:
    """Draws a sheet with a row per case, in the order given."""
    samples, texts = [], []
    for case in cases:
        pixels = case.original, case.rebuilt, difference(case.original, case.rebuilt)
        samples.append([Image.fromarray(image) for image in pixels])
        measured = case.measured
        figures = f"{measured.psnr:.2f} dB, SSIM {measured.ssim:.4f}"
        if measured.lpips is not None:
            figures += f", LPIPS {measured.lpips:.4f}"
        if measured.ned is not None:
            figures += f", NED {measured.ned:.4f}"
        texts.append(f"{figures}, {in_ascii(measured.name)}")
    return lay_out(samples, COLUMNS, texts, 1)
