"""The group `data` of a config: which records a stage trains on, at which resolutions and in which shares."""

import dataclasses
import functools

from data_pipeline.buckets import Buckets, Resolutions
from data_pipeline.loading.mixture import Shares
from data_pipeline.samples.held_out import check_held_out
from data_pipeline.selection.thresholds import Thresholds
from qi2_jax.config.fields import changeable, check_at_least


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Shares of the steps of a stage.

    Attributes:
      sides: shares of the resolutions, one for each side in `data.sides`.
      tasks: shares of text-to-image steps and of edit steps.
      conditions: shares of edit steps with one, two, ... condition images.
    """

    sides: tuple[int, ...]
    tasks: tuple[int, ...]
    conditions: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a stage trains on.

    Attributes:
      sides: sides in pixels of the squares that give the areas of the buckets, in ascending order.
      ratios: aspect ratios of the buckets, width to height, such as "16:9".
      max_upscale: largest factor by which an image is enlarged.
      max_cropped: largest fraction of an image's area that is cropped.
      smaller_too: whether an image is also used at every smaller resolution.
      held_out: fraction of the images that is held out for validation.
      mixture: shares of the steps.
      thresholds: thresholds that select the records.
      channels: channels of the images that the demo's autoencoder reads, 3 (RGB) or 4 (RGBA).
      workers: number of processes that score the demo's records; 0 means one per core.

    Raises:
      ValueError: for a value out of its range.
    """

    sides: tuple[int, ...]
    ratios: tuple[str, ...]
    max_upscale: float
    max_cropped: float
    smaller_too: bool
    held_out: float
    mixture: MixtureConfig
    thresholds: Thresholds
    channels: int = 4
    workers: int = changeable(default=0)

    def __post_init__(self) -> None:
        check_at_least(self, workers=0)
        check_held_out(self.held_out)
        _ = self.resolutions
        self.shares.weights()

    @functools.cached_property
    def resolutions(self) -> Resolutions:
        """The buckets of all resolutions."""
        areas = (
            (side, Buckets.for_area(side, self.ratios, max_upscale=self.max_upscale, max_cropped=self.max_cropped))
            for side in self.sides
        )
        return Resolutions(tuple(areas), self.smaller_too)

    @functools.cached_property
    def shares(self) -> Shares:
        """The shares of resolutions and tasks."""
        mixture = self.mixture
        return Shares(self.sides, mixture.sides, mixture.tasks, mixture.conditions)  # type: ignore[arg-type]
