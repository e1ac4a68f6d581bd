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
    "NED": "for text pages, mean of 1 - Levenshtein distance / length of the longer text, 1 is best, between OCR of "
    "original and reconstruction: lines joined without separators; pages on whose original OCR finds no text are left "
    "out and counted; if only the reconstruction has no text, NED is 0",
    FRECHET_NAME: "squared Frechet distance between VGG16 relu5_3 features, averaged over positions, of originals and "
    "reconstructions; not FID, and biased upwards for few images",
    "resolution": "the power of two nearest, in logarithms, to the square root of the area",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one autoencoder on a set of images; None: not measured.

    Attributes:
      set: category and resolution, or `ALL`.
      category, resolution: the two apart; None for all images.
      model: name of the autoencoder.
      code: its factor and latent channels, as in `f16c64`.
      images: number of images.
      exact: number of images that were reproduced exactly; their PSNR is infinite.
      psnr, psnr_pooled, ssim, ms_ssim, lpips, frechet, ned: see `DEFINITIONS`.
      pages: number of images that OCR read, whether it found text or not.
      pages_without_text: number of these on whose original it found no text; they do not enter `ned`.
      invented_text: number of the latter on whose reconstruction it found text.
    """

    set: str
    category: str | None
    resolution: str | None
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
    ned: float | None
    pages: int
    pages_without_text: int
    invented_text: int


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Figures per category and resolution, and over all images if there are several such sets; set by set."""
    pairs = {_set_of(image) for result in results for image in result.images}
    ordered = sorted(pairs, key=lambda pair: (pair[0], len(pair[1]), pair[1]))  # 256p before 1024p
    sets: list[tuple[str, str] | None] = [*ordered, None] if len(ordered) > 1 else [*ordered]
    return [_row(result, pair) for pair in sets for result in results]


def _set_of(image: Measured) -> tuple[str, str]:
    return image.category, image.resolution


def _row(result: Result, pair: tuple[str, str] | None) -> Row:
    """The figures of the images of a category and resolution, or of all images."""
    chosen = [index for index, image in enumerate(result.images) if pair in (None, _set_of(image))]
    images = [result.images[index] for index in chosen]
    finite = [image.psnr for image in images if math.isfinite(image.psnr)]
    pixels = [image.width * image.height for image in images]
    pooled = pixel_metrics.psnr(float(np.average([image.mean_squared_error for image in images], weights=pixels)))
    features = None if result.features is None else [side[chosen] for side in result.features]
    texts = [image.texts for image in images if image.texts is not None]
    category, resolution = pair or (None, None)
    without = [both for both in texts if not both.original]
    return Row(
        ALL if pair is None else " ".join(pair),
        category,
        resolution,
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
        _mean([image.ned for image in images if image.ned is not None]),
        len(texts),
        len(without),
        sum(bool(both.rebuilt) for both in without),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def table(title: str, rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """The table of an evaluation. Columns of LPIPS and of OCR exist only if these were measured."""
    has_lpips = any(row.lpips is not None for row in rows)
    has_pages = any(row.pages for row in rows)
    numbers = ["images", "PSNR", "PSNR pooled", "SSIM", "MS-SSIM"]
    numbers += (["LPIPS", FRECHET_NAME] if has_lpips else []) + (["NED", "pages"] if has_pages else [])
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
        with_text = f"{row.pages - row.pages_without_text:,} of {row.pages:,}" if row.pages else "-"
        cells += [_number(row.ned, ".4f"), with_text] if has_pages else []
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
        texts = None if image.texts is None else image.texts._asdict()
        images.append(dataclasses.asdict(image) | {"psnr": psnr, "texts": texts, "ned": image.ned})
    sizes = {"factor": result.factor, "channels": result.channels}
    return {"model": result.model, **sizes, "weights_sha256": result.digest, "images": images}


def _psnr(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
