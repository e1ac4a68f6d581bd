"""The evaluation of autoencoders on a folder of images, beside the linear codes of equal size."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.funnel import Tally
from qi2_jax.evaluation import linear_code, quoted, summary
from qi2_jax.evaluation.autoencoders import Autoencoder, Described, JaxAutoencoder, Reconstructs
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
      fit: folder on which the linear codes are fitted; None: the evaluated images.
      held_out: if above 0, only records that training with this `data.held_out` holds out are evaluated. The linear
        codes are fitted on the other records of `fit`.
      side: if given, images are resized so that their shorter side is this, and cropped to a square.
      max_side: larger images are cropped to this side.
      worst: number of the worst cases to keep.
    """

    data: Path
    fit: Path | None = None
    held_out: float = 0.0
    side: int | None = None
    max_side: int = 1024
    worst: int = 8


@dataclasses.dataclass
class Evaluation:
    """Measurements of all autoencoders; it grows while they are measured.

    Attributes:
      options: options of the evaluation.
      multiple: pixels of which the sides of all images are multiples.
      perceptual: LPIPS and features; None leaves them out.
      pages: OCR of text pages; None leaves it out.
      results: measurements by model; every linear code comes before the models of its size.
      failed: error messages of the models that could not be measured, by name.
      pending: names of the models that are not measured yet.
      refused: images that were not measured, by reason.
      notes: what a reader of the table must know.
    """

    options: Options
    multiple: int
    perceptual: Perceptual | None
    pages: PageReader | None
    results: list[Result] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    pending: list[str] = dataclasses.field(default_factory=list)
    refused: Tally = dataclasses.field(default_factory=Tally)
    notes: list[str] = dataclasses.field(default_factory=list)

    def rows(self) -> list[summary.Row]:
        return summary.rows_of(self.results)

    def measure(self, code: Described, model: Reconstructs, data: ImageFolder) -> None:
        """Measures one autoencoder.

        Args:
          code: name and size of the autoencoder.
          model: the autoencoder in memory.
          data: images.

        Raises:
          ValueError: if the model fails, or no image can be read. The results so far are unchanged.
        """
        refused = Tally()
        items = data.read(refused, f"{code.name} f{code.factor}c{code.channels}")
        result = measure(code, model, items, self.perceptual, self.pages, self.options.worst)
        if exact := sum(math.isinf(image.psnr) for image in result.images):
            self.notes.append(
                f"{code.name} reproduces {exact:,} of {len(result.images):,} images exactly; their PSNR is infinite "
                "and not in its mean, so compare PSNR pooled"
            )
        if not self.results:
            self.refused = refused
            self.notes += [] if self.pages is None else _describe_pages(result, self.pages.categories)
        self.results.append(result)

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        pages = self.pages
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self.options).items()
        }
        return {
            "options": options | {"multiple": self.multiple, "ocr": [] if pages is None else list(pages.categories)},
            "definitions": summary.DEFINITIONS,
            "notes": self.notes,
            "lpips_sha256": None if self.perceptual is None else self.perceptual.digest,
            "ocr": None if pages is None else pages.engine,
            "refused": self.refused.to_dict(),
            "failed": self.failed,
            "pending": self.pending,
            "rows": [dataclasses.asdict(row) for row in self.rows()],
            "models": [summary.to_dict(result) for result in self.results],
            "quoted": {"source": quoted.SOURCE, "rows": [row._asdict() for row in quoted.ROWS]},
        }


def evaluate(
    models: Sequence[Autoencoder],
    options: Options,
    perceptual: Perceptual | None,
    pages: PageReader | None = None,
    save: Callable[[Evaluation], None] | None = None,
) -> Evaluation:
    """Measures the linear codes of all sizes, and then every model, with one model in memory at a time.

    Images are decoded again for every model, so memory does not grow with their number. A model that raises a
    ValueError, for instance because of damaged weights, is noted in `Evaluation.failed`.

    Args:
      models: autoencoders.
      options: see `Options`.
      perceptual: LPIPS and features; None leaves them out.
      pages: OCR of text pages; None leaves it out.
      save: function that keeps what is measured so far; it is called after the linear codes and after each model.

    Raises:
      ValueError: if no image can be read, or as `ImageFolder`.
    """
    sizes = list(dict.fromkeys((model.factor, model.channels) for model in models)) or [DEFAULT_SIZE]
    multiple = math.lcm(PATCH_MULTIPLE, *(factor for factor, _ in sizes))
    data = ImageFolder(options.data, multiple, options.max_side, options.side, options.held_out)
    found = Evaluation(options, multiple, perceptual, pages, pending=[model.name for model in models])
    found.notes += _describe_records(data, models)
    for code in _fit(data, sizes, found):
        found.measure(code, code, data)
    if perceptual is None:
        found.notes.append("LPIPS was not measured: give its weights with --lpips FOLDER")
    save = save or (lambda evaluation: None)
    save(found)
    for model in models:
        try:
            with model.loaded() as loaded:
                found.measure(model, loaded, data)
        except ValueError as error:
            found.failed[model.name] = str(error)
            found.notes.append(f"{model.name} could not be measured: {str(error).strip().splitlines()[-1]}")
        found.pending.remove(model.name)
        save(found)
    return found


def _fit(data: ImageFolder, sizes: Sequence[tuple[int, int]], found: Evaluation) -> list[linear_code.LinearCode]:
    """Fits the linear codes, and notes on what."""
    options, not_fitted = found.options, Tally()
    fit = data if options.fit is None else dataclasses.replace(data, folder=options.fit, is_training=True)
    fitted = [(factor, channels) for factor, channels in sizes if 3 * factor**2 <= linear_code.MAX_VALUES]
    codes = linear_code.fit((item.pixels for item in fit.read(not_fitted, "fitting the linear code")), fitted)
    if options.fit is not None and not_fitted.total:
        found.notes.append(f"{options.fit}: {not_fitted.total:,} images could not be read: {not_fitted.counts}")
    found.notes += [_describe(code, options) for code in codes]
    found.notes += [
        f"no linear code f{factor}c{channels}: its patches are too large to fit"
        for factor, channels in sizes
        if (factor, channels) not in fitted
    ]
    return codes


def _describe_records(data: ImageFolder, models: Sequence[Autoencoder]) -> list[str]:
    """Which records are evaluated, and which models were trained on others or on the same."""
    notes, digest = [], data.digest
    if data.held_out:
        notes.append(f"only held-out records are measured: --held-out {data.held_out}, by {data.hold_out.rule}")
    for model in models:
        if not isinstance(model, JaxAutoencoder) or digest not in model.trained_on:
            continue
        if data.held_out:
            notes.append(
                f"{model.name} was trained on these records: its figures are too good unless its data.held_out was at "
                f"least {data.held_out}"
            )
        else:
            notes.append(
                f"{model.name} was trained on these records, so its figures are too good; --held-out FRACTION with its "
                "data.held_out measures only records that it has not seen"
            )
    return notes


def _describe_pages(result: Result, categories: Sequence[str]) -> list[str]:
    """Categories without images, and how many pages have no text that OCR finds."""
    found = {image.category for image in result.images}
    notes = [
        f"no image has the category {name!r} of --ocr, only {', '.join(map(repr, sorted(found)))}"
        for name in categories
        if name not in found
    ]
    read = [image.texts for image in result.images if image.texts is not None]
    if without := sum(not texts.original for texts in read):
        notes.append(f"NED leaves out {without:,} of {len(read):,} pages: OCR finds no text in the original")
    return notes


def _describe(code: linear_code.LinearCode, options: Options) -> str:
    """What a linear code was fitted on, and whether it overfits."""
    label = f"{code.name} f{code.factor}c{code.channels}"
    is_same = options.fit is None or (not options.held_out and options.fit.resolve() == options.data.resolve())
    place = "the evaluated images themselves" if is_same else str(options.fit)
    note = f"{label}: fitted on {place} ({code.num_patches:,} patches)"
    if is_same:
        note += "; it has seen what it is judged on, so its figures are too good: give other images with --fit"
        note += f" {options.data}, of which it takes the training records" if options.held_out else ""
    if code.num_patches < MIN_PATCHES_PER_COMPONENT * code.channels:
        note += f"; fewer than {MIN_PATCHES_PER_COMPONENT} patches per component, so it overfits"
    return note
