"""The evaluation of autoencoders on a folder of images, beside the linear codes of equal size."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.funnel import Tally
from qi2_jax.evaluation import linear_code, quoted, summary
from qi2_jax.evaluation.autoencoders import Autoencoder
from qi2_jax.evaluation.images import ImageFolder
from qi2_jax.evaluation.measuring import Result, measure
from qi2_jax.evaluation.ocr import PageReader
from qi2_jax.evaluation.perceptual import Perceptual

DEFAULT_SIZE = (16, 64)  # factor and channels of the linear code without any model
PATCH_MULTIPLE = 16  # sides are multiples of this, whatever the models need
MIN_PATCHES_PER_COMPONENT = 100  # below this, the linear code is said to overfit


@dataclasses.dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    Attributes:
      data: folder of images or of records.
      fit: folder on which the linear codes are fitted; None: `data` itself.
      side: if given, images are resized so that their shorter side is this, and cropped to a square.
      max_side: larger images are cropped to this side.
      worst: number of the worst cases to keep.
    """

    data: Path
    fit: Path | None = None
    side: int | None = None
    max_side: int = 1024
    worst: int = 8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Measurements of all autoencoders.

    Attributes:
      options: options of the evaluation.
      multiple: pixels of which the sides of all images are multiples.
      results: measurements by model; every linear code comes before the models of its size.
      refused: images that were not measured, by reason.
      notes: what a reader of the table must know.
      lpips: SHA-256 of the weights of LPIPS; None without.
      ocr: name and version of the OCR engine; None without.
    """

    options: Options
    multiple: int
    results: list[Result]
    refused: Tally
    notes: list[str]
    lpips: str | None
    ocr: str | None

    def rows(self) -> list[summary.Row]:
        return summary.rows_of(self.results)

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        options = {name: str(value) if isinstance(value, Path) else value for name, value in self._options().items()}
        return {
            "options": options | {"multiple": self.multiple},
            "definitions": summary.DEFINITIONS,
            "notes": self.notes,
            "lpips_sha256": self.lpips,
            "ocr": self.ocr,
            "refused": self.refused.to_dict(),
            "rows": [dataclasses.asdict(row) for row in self.rows()],
            "models": [summary.to_dict(result) for result in self.results],
            "quoted": {"source": quoted.SOURCE, "rows": [row._asdict() for row in quoted.ROWS]},
        }

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}


def evaluate(
    models: Sequence[Autoencoder], options: Options, perceptual: Perceptual | None, pages: PageReader | None = None
) -> Evaluation:
    """Measures the linear codes of all sizes, and then every model, with one model in memory at a time.

    Images are decoded again for every model, so memory does not grow with their number.

    Args:
      models: autoencoders.
      options: see `Options`.
      perceptual: LPIPS and features; None leaves them out.
      pages: OCR of text pages; None leaves it out.

    Raises:
      ValueError: if no image can be measured, or as `ImageFolder` and the models.
    """
    sizes = list(dict.fromkeys((model.factor, model.channels) for model in models)) or [DEFAULT_SIZE]
    multiple = math.lcm(PATCH_MULTIPLE, *(factor for factor, _ in sizes))
    data = ImageFolder(options.data, multiple, options.max_side, options.side)
    fit = data if options.fit is None else dataclasses.replace(data, folder=options.fit)
    refused, not_fitted, notes = Tally(), Tally(), []
    fitted = [(factor, channels) for factor, channels in sizes if 3 * factor**2 <= linear_code.MAX_VALUES]
    codes = linear_code.fit((item.pixels for item in fit.read(not_fitted, "fitting the linear code")), fitted)
    if options.fit is not None and not_fitted.total:
        notes.append(f"{options.fit}: {not_fitted.total:,} images could not be read: {not_fitted.counts}")
    results: list[Result] = []
    for code in codes:
        notes.append(_describe(code, options))
        items = data.read(refused if not results else Tally(), f"{code.name} f{code.factor}c{code.channels}")
        results.append(measure(code, code, items, perceptual, pages, options.worst))
    for factor, channels in sizes:
        if (factor, channels) not in fitted:
            notes.append(f"no linear code f{factor}c{channels}: its patches are too large to fit")
    for model in models:
        with model.loaded() as loaded:
            items = data.read(refused if not results else Tally(), model.name)
            results.append(measure(model, loaded, items, perceptual, pages, options.worst))
    if not results[0].images:
        raise ValueError(f"no image in {options.data} could be read; refused: {refused.counts}")
    if perceptual is None:
        notes.append("LPIPS was not measured: give its weights with --lpips FOLDER")
    if pages is not None:
        notes += _describe_pages(results[0], pages.categories)
    lpips = None if perceptual is None else perceptual.digest
    return Evaluation(options, multiple, results, refused, notes, lpips, None if pages is None else pages.engine)


def _describe_pages(result: Result, categories: Sequence[str]) -> list[str]:
    """Categories without images, and how many pages have no text that OCR finds."""
    found = {image.category for image in result.images}
    notes = [f"no image has the category {name!r} of --ocr" for name in categories if name not in found]
    read = [image.texts for image in result.images if image.texts is not None]
    if without := sum(not texts.original for texts in read):
        notes.append(f"NED leaves out {without:,} of {len(read):,} pages: OCR finds no text in the original")
    return notes


def _describe(code: linear_code.LinearCode, options: Options) -> str:
    """What a linear code was fitted on, and whether it overfits."""
    label = f"{code.name} f{code.factor}c{code.channels}"
    place = "the evaluated images themselves" if options.fit is None else str(options.fit)
    note = f"{label}: fitted on {place} ({code.num_patches:,} patches)"
    if options.fit is None:
        note += "; it has seen what it is judged on, so its figures are too good: give other images with --fit"
    if code.num_patches < MIN_PATCHES_PER_COMPONENT * code.channels:
        note += f"; fewer than {MIN_PATCHES_PER_COMPONENT} patches per component, so it overfits"
    return note
