"""Means of measurements per category and resolution, and the tables that show them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.funnel import Table
from qi2_jax.evaluation import pixel_metrics, quoted
from qi2_jax.evaluation.measuring import Measured, Result
from qi2_jax.evaluation.perceptual import FRECHET_NAME, frechet_distance

ALL = "all"
DEFINITIONS = {
    "pixels": "RGB, 8 bits, after rounding; transparent images are composited over white",
    "PSNR": "10 log10(255^2 / MSE) per image, mean over images; exact reconstructions are left out",
    "PSNR pooled": "10 log10(255^2 / MSE) with the MSE over all pixels of all images",
    "SSIM": "Gaussian window 11 x 11, sigma 1.5, K 0.01 and 0.03, covariances divided by N, windows inside the image, "
    "mean over RGB; scikit-image: structural_similarity(a, b, channel_axis=-1, data_range=255, gaussian_weights=True, "
    "sigma=1.5, use_sample_covariance=False)",
    "MS-SSIM": "five scales with the weights 0.0448, 0.2856, 0.3001, 0.2363 and 0.1333, halved by averaging 2 x 2 "
    f"pixels; only images with sides of at least {pixel_metrics.MIN_SIDE_MULTISCALE} pixels",
    "LPIPS": "version 0.1 on VGG16, images scaled to [-1, 1]",
    FRECHET_NAME: "squared Frechet distance between VGG16 relu5_3 features, averaged over positions, of originals and "
    "reconstructions; not FID, and biased upwards for few images",
    "resolution": "the power of two nearest, in logarithms, to the square root of the area",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one autoencoder on a set of images; None: not measured.

    Attributes:
      set: category and resolution, or `ALL`.
      model: name of the autoencoder.
      code: its factor and latent channels, as in `f16c64`.
      images: number of images.
      exact: number of images that were reproduced exactly; their PSNR is infinite.
      psnr, psnr_pooled, ssim, ms_ssim, lpips, frechet: see `DEFINITIONS`.
    """

    set: str
    model: str
    code: str
    images: int
    exact: int
    psnr: float | None
    psnr_pooled: float | None
    ssim: float
    ms_ssim: float | None
    lpips: float | None
    frechet: float | None


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Figures per category and resolution, and over all images if there are several such sets; set by set."""
    names = sorted({set_of(image) for result in results for image in result.images})
    sets: list[str | None] = [*names, None] if len(names) > 1 else [*names]
    return [_row(result, name) for name in sets for result in results]


def set_of(image: Measured) -> str:
    """Name of the category and resolution of an image."""
    return f"{image.category} {image.resolution}"


def _row(result: Result, name: str | None) -> Row:
    chosen = [index for index, image in enumerate(result.images) if name in (None, set_of(image))]
    images = [result.images[index] for index in chosen]
    finite = [image.psnr for image in images if math.isfinite(image.psnr)]
    pixels = [image.width * image.height for image in images]
    pooled = pixel_metrics.psnr(float(np.average([image.mean_squared_error for image in images], weights=pixels)))
    features = None if result.features is None else [side[chosen] for side in result.features]
    return Row(
        ALL if name is None else name,
        result.model,
        f"f{result.factor}c{result.channels}",
        len(images),
        len(images) - len(finite),
        _mean(finite),
        pooled if math.isfinite(pooled) else None,
        float(np.mean([image.ssim for image in images])),
        _mean([image.ms_ssim for image in images if image.ms_ssim is not None]),
        _mean([image.lpips for image in images if image.lpips is not None]),
        None if features is None else frechet_distance(features[0], features[1]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def table(title: str, rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """The table of an evaluation. Columns of LPIPS exist only if it was measured."""
    has_lpips = any(row.lpips is not None for row in rows)
    numbers = ["images", "PSNR", "PSNR pooled", "SSIM", "MS-SSIM", *(["LPIPS", FRECHET_NAME] if has_lpips else [])]
    view = Table(title, ["set", "model", "code", *numbers], numbers)
    for index, row in enumerate(rows):
        is_last = index + 1 == len(rows) or rows[index + 1].set != row.set
        cells = [
            f"{row.images:,}",
            _psnr(row.psnr),
            _psnr(row.psnr_pooled),
            f"{row.ssim:.4f}",
            _number(row.ms_ssim, ".4f"),
        ]
        cells += [_number(row.lpips, ".4f"), _number(row.frechet, ".3f")] if has_lpips else []
        view.add_row(row.set, row.model, row.code, *cells, end_section=is_last)
    view.caption = "\n".join(notes)
    return view


def quoted_table() -> Table:
    """The published figures, marked as quoted."""
    numbers = ("enc. M", "dec. M", "IN-256 PSNR", "IN-256 SSIM", "Text-256 PSNR", "Text-256 SSIM")
    title = f"Quoted, not measured here, and on other images: {quoted.SOURCE}"
    view = Table(title, ("model (quoted)", "code", *numbers), numbers)
    for row in quoted.ROWS:
        sizes = f"{row.encoder_millions}", f"{row.decoder_millions}"
        figures = f"{row.imagenet_psnr:.2f}", f"{row.imagenet_ssim:.4f}", f"{row.text_psnr:.2f}", f"{row.text_ssim:.4f}"
        view.add_row(row.model, row.code, *sizes, *figures)
    return view


def to_dict(result: Result) -> dict[str, Any]:
    """The figures of each image, for JSON; an infinite PSNR is None."""
    images = []
    for image in result.images:
        psnr = image.psnr if math.isfinite(image.psnr) else None
        images.append(dataclasses.asdict(image) | {"psnr": psnr})
    return {"model": result.model, "factor": result.factor, "channels": result.channels, "images": images}


def _psnr(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
