"""Measures how well autoencoders give images back, one image or small batch at a time."""

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from qi2_jax.evaluation import pixel_metrics
from qi2_jax.evaluation.autoencoders import Described, Reconstructs
from qi2_jax.evaluation.images import Item, in_batches
from qi2_jax.evaluation.ocr import PageReader, Texts, similarity
from qi2_jax.evaluation.perceptual import Perceptual


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one autoencoder did to one image; metrics that were not measured are None.

    Attributes:
      name, category, resolution: see `Item`.
      width, height: size of the cropped image in pixels.
      mean_squared_error: see `pixel_metrics.mean_squared_error`.
      ssim, lpips: metrics.
      ms_ssim: metric; None for an image below `pixel_metrics.MIN_SIDE_MULTISCALE` pixels.
      texts: texts that OCR reads; None for an image that is not read.
    """

    name: str
    category: str
    resolution: str
    width: int
    height: int
    mean_squared_error: float
    ssim: float
    ms_ssim: float | None
    lpips: float | None
    texts: Texts | None

    @property
    def psnr(self) -> float:
        return pixel_metrics.psnr(self.mean_squared_error)

    @property
    def ned(self) -> float | None:
        """Similarity of the two texts; None without OCR, or if it finds no text in the original."""
        return similarity(*self.texts) if self.texts is not None and self.texts.original else None


@dataclasses.dataclass(frozen=True)
class Case:
    """An image and its reconstruction, for the sheet of the worst cases."""

    measured: Measured
    original: UInt8[np.ndarray, "H W 3"]
    rebuilt: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one autoencoder.

    Attributes:
      model, factor, channels, digest: see `Described`.
      images: measurements of each image.
      features: features of the originals and of the reconstructions, row by row; None without LPIPS.
      worst: cases with the largest LPIPS or, without it, the largest squared error, worst first.
    """

    model: str
    factor: int
    channels: int
    digest: str | None
    images: list[Measured]
    features: tuple[Float[np.ndarray, "B F"], Float[np.ndarray, "B F"]] | None
    worst: list[Case]


def measure(
    code: Described,
    model: Reconstructs,
    items: Iterable[Item],
    perceptual: Perceptual | None,
    pages: PageReader | None,
    worst: int,
) -> Result:
    """Measures an autoencoder on images.

    Args:
      code: name and size of the autoencoder.
      model: the autoencoder in memory.
      items: images whose sides are multiples of the model's factor.
      perceptual: LPIPS and features; None leaves them out.
      pages: OCR of text pages; None leaves it out.
      worst: number of cases to keep.
    """
    images: list[Measured] = []
    features: list[tuple[np.ndarray, np.ndarray]] = []
    heap: list[tuple[float, int, Case]] = []  # the count breaks ties, because cases cannot be compared
    for batch in in_batches(items):
        originals = np.stack([item.pixels for item in batch])
        rebuilt = model.reconstruct(originals)
        distances: Sequence[float | None] = [None] * len(batch)
        if perceptual is not None:
            found, *pair = perceptual(originals, rebuilt)
            distances = found.tolist()
            features.append((pair[0], pair[1]))
        for item, pixels, distance in zip(batch, rebuilt, distances, strict=True):
            texts = None if pages is None else pages(item, pixels)
            measured = _measure(item, pixels, distance, texts)
            images.append(measured)
            badness = measured.mean_squared_error if distance is None else distance
            heapq.heappush(heap, (badness, len(images), Case(measured, item.pixels, pixels)))
            if len(heap) > worst:
                heapq.heappop(heap)
    stacked = [np.concatenate(side) for side in zip(*features, strict=True)]
    return Result(
        code.name,
        code.factor,
        code.channels,
        code.digest,
        images,
        (stacked[0], stacked[1]) if stacked else None,
        [case for _, _, case in sorted(heap, key=lambda entry: entry[:2], reverse=True)],
    )


def _measure(item: Item, rebuilt: UInt8[np.ndarray, "H W 3"], lpips: float | None, texts: Texts | None) -> Measured:
    height, width, _ = rebuilt.shape
    is_large = min(height, width) >= pixel_metrics.MIN_SIDE_MULTISCALE
    return Measured(
        item.name,
        item.category,
        item.resolution,
        width,
        height,
        pixel_metrics.mean_squared_error(item.pixels, rebuilt),
        pixel_metrics.ssim(item.pixels, rebuilt),
        pixel_metrics.ms_ssim(item.pixels, rebuilt) if is_large else None,
        lpips,
        texts,
    )
