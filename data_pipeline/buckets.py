"""Buckets: image sizes of nearly equal area and many aspect ratios, so that one padded token count fits a stage."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.funnel import Step, Table, Tally, table

PATCH = 16  # pixels per side of a token: the compression of the VAE
RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9", "1:3", "3:1")  # width : height, Qwen-Image report


@dataclass(frozen=True)
class Bucket:
    """A size in pixels to which images are resized and cropped."""

    width: int
    height: int

    @property
    def tokens(self) -> int:
        """Image tokens of one image: latent positions of a 16x VAE."""
        return (self.width // PATCH) * (self.height // PATCH)

    @property
    def log_aspect(self) -> float:
        """log(width / height); swapping the sides negates it exactly."""
        return math.log(self.width) - math.log(self.height)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Fit:
    """How an image fits its bucket.

    Attributes:
      bucket: bucket with the nearest aspect ratio.
      scale: factor of the resize that covers the bucket; above 1 enlarges.
      cropped: fraction of the image's area that is cropped, 0..1.
      left_out: None if the image can be used; otherwise `upscaled_too_much` or `cropped_too_much`.
    """

    bucket: Bucket
    scale: float
    cropped: float
    left_out: str | None


@dataclass(frozen=True)
class Buckets:
    """The buckets of a resolution stage, and how far an image may be changed to fit.

    Attributes:
      sizes: buckets, from the tallest to the widest.
      max_upscale: largest factor by which an image is enlarged; 1 means never.
      max_cropped: largest fraction of an image's area that is cropped.
    """

    sizes: tuple[Bucket, ...]
    max_upscale: float = 1.0
    max_cropped: float = 0.25

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("a stage needs at least one bucket")
        if self.max_upscale <= 0 or not 0 <= self.max_cropped < 1:
            raise ValueError(
                f"max_upscale {self.max_upscale} must be above 0 and max_cropped {self.max_cropped} in [0, 1)"
            )

    @classmethod
    def for_area(
        cls,
        side: int,
        ratios: tuple[str, ...] = RATIOS,
        multiple: int = 32,
        max_upscale: float = 1.0,
        max_cropped: float = 0.25,
    ) -> "Buckets":
        """Buckets of about `side` x `side` pixels: the sides of every ratio, rounded to the grid, without repeats.

        Args:
          side: side of the square that gives the area, in pixels.
          ratios: ratios of width to height, such as "16:9".
          multiple: grid of both sides in pixels; a multiple of 16, the size of a token.

        Raises:
          ValueError: for a malformed ratio, a grid that splits tokens, or a side below the grid.
        """
        if multiple < PATCH or multiple % PATCH:
            raise ValueError(f"multiple {multiple} must be a multiple of {PATCH}, the pixels of one token")
        if side < multiple:
            raise ValueError(f"side {side} is below the grid of {multiple} pixels")
        sizes = set()
        for ratio in ratios:
            root = math.sqrt(_parse_ratio(ratio))
            on_grid = (max(1, round(length / multiple)) * multiple for length in (side * root, side / root))
            sizes.add(Bucket(*on_grid))
        return cls(tuple(sorted(sizes, key=lambda size: (size.log_aspect, size.width))), max_upscale, max_cropped)

    @property
    def max_tokens(self) -> int:
        """Token count of the largest bucket, to which every image of the stage is padded."""
        return max(size.tokens for size in self.sizes)

    def assign(self, width: int, height: int) -> Bucket:
        """The bucket with the nearest aspect ratio on a logarithmic scale; of two equally near, the squarer one.

        Raises:
          ValueError: if a side is not positive.
        """
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width} x {height} pixels has no aspect ratio")
        aspect = math.log(width) - math.log(height)
        return min(self.sizes, key=lambda size: (abs(size.log_aspect - aspect), abs(size.log_aspect)))

    def fit(self, width: int, height: int) -> Fit:
        """How an image fits its bucket. Raises the errors of `assign`."""
        bucket = self.assign(width, height)
        scale = max(bucket.width / width, bucket.height / height)
        left, top, right, bottom = crop_box(width, height, bucket)
        cropped = max(0.0, 1 - (right - left) * (bottom - top) / (width * height))
        left_out = None
        if scale > self.max_upscale:
            left_out = "upscaled_too_much"
        elif cropped > self.max_cropped:
            left_out = "cropped_too_much"
        return Fit(bucket, scale, cropped, left_out)

    def report(self, sizes: Iterable[tuple[int, int]]) -> "BucketReport":
        """Counts how images of the given (width, height) fit."""
        return Resolutions(((0, self),)).report(sizes)


@dataclass(frozen=True)
class Resolutions:
    """The buckets of one or more areas. An image goes to the largest area that it fills.

    Attributes:
      areas: pairs of a side and its buckets, by ascending side.
      smaller_too: whether an image is also used at every smaller area.
    """

    areas: tuple[tuple[int, Buckets], ...]
    smaller_too: bool = False

    def __post_init__(self) -> None:
        sides = [side for side, _ in self.areas]
        if not sides or sides != sorted(set(sides)):
            raise ValueError(f"sides {sides} must be one or more sides in ascending order")

    def buckets(self, side: int) -> Buckets:
        """The buckets of one area."""
        return dict(self.areas)[side]

    def fits(self, width: int, height: int) -> list[tuple[int, Fit]]:
        """The sides and buckets that an image goes to, largest first.

        For an image that fits nowhere, the result is the smallest area alone, with the reason in `left_out`.
        """
        fits = [(side, buckets.fit(width, height)) for side, buckets in reversed(self.areas)]
        fitting = [(side, fit) for side, fit in fits if fit.left_out is None]
        return (fitting if self.smaller_too else fitting[:1]) or fits[-1:]

    def report(self, sizes: Iterable[tuple[int, int]]) -> "BucketReport":
        """Counts how images of the given (width, height) fit."""
        counts = {str(size): 0 for _, buckets in self.areas for size in buckets.sizes}
        cropped, upscaled, left_out, seen = 0.0, 0, Tally(), 0
        for width, height in sizes:
            seen += 1
            for _, fit in self.fits(width, height):
                if fit.left_out:
                    left_out.add(fit.left_out, f"{width}x{height}")
                    continue
                counts[str(fit.bucket)] += 1
                cropped += fit.cropped
                upscaled += fit.scale > 1
        used = sum(counts.values())
        return BucketReport(seen, counts, cropped / used if used else 0.0, upscaled, left_out)


@dataclass(frozen=True)
class BucketReport:
    """How a set of images fits.

    Attributes:
      seen: number of images.
      counts: number of used images per bucket.
      mean_cropped: mean fraction of the area that is cropped from the used images.
      upscaled: number of used images that are enlarged.
      left_out: images that fit no bucket, by reason.
    """

    seen: int
    counts: dict[str, int]
    mean_cropped: float
    upscaled: int
    left_out: Tally

    def table(self) -> Table:
        """A table of the images that were left out, by reason, and the number of images in each bucket."""
        steps = [Step("fit a bucket", self.seen, self.left_out)]
        steps += [Step(name, count, Tally()) for name, count in self.counts.items()]
        return table(f"buckets: mean crop {self.mean_cropped:.1%}, enlarged {self.upscaled:,}", tuple(steps))

    def to_dict(self) -> dict:
        return {
            "seen": self.seen,
            "buckets": self.counts,
            "mean_cropped": self.mean_cropped,
            "upscaled": self.upscaled,
            "left_out": self.left_out.to_dict(),
        }


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The largest centred box (left, top, right, bottom) of the image with the bucket's aspect ratio, in pixels."""
    scale = max(bucket.width / width, bucket.height / height)
    box_width, box_height = min(bucket.width / scale, width), min(bucket.height / scale, height)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return left, top, min(left + box_width, width), min(top + box_height, height)


def _parse_ratio(ratio: str) -> float:
    parts = ratio.split(":")
    if len(parts) == 2 and all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]) / int(parts[1])
    raise ValueError(f"ratio {ratio!r} must be width:height with positive integers, such as '16:9'")
