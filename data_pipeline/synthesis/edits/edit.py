"""Shared by all generators of edits: an edit, the images it is made from, and placements in an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from data_pipeline.records.schema import Caption
from data_pipeline.records.shards import RecordFolder
from data_pipeline.synthesis.edits.compositing import MAX_ENLARGED, Placement
from data_pipeline.synthesis.edits.cutouts import Cutout, CutoutFile, Unsuitable, cutout_of_record
from data_pipeline.synthesis.edits.scenes import MIN_SIDE, Scene, read_scene
from data_pipeline.synthesis.lettering.fonts import FontLibrary

Drawn = TypeVar("Drawn", Scene, Cutout)

ATTEMPTS = 8  # images that are drawn until one is suitable


@dataclass(frozen=True)
class Edit:
    """An exact pair.

    Attributes:
      sources: images, or the original files of unchanged images.
      target: image, or the original file of an unchanged image.
      instructions: several wordings of the edit.
      tags: class of the edit, such as `edit/local`, and its kind.
      parts: scenes and cut-outs that it shows.
    """

    sources: tuple[Image.Image | bytes, ...]
    target: Image.Image | bytes
    instructions: tuple[Caption, ...]
    tags: tuple[str, ...]
    parts: tuple[Scene | Cutout, ...]


@dataclass
class Ingredients:
    """Images to make edits from, drawn at random.

    Attributes:
      records: folder of the images.
      cutouts: files, or positions of records.
      max_side: side in pixels to which larger images are reduced.
      fonts: fonts for Latin and Chinese text; None if no text is written.
      refuse: function that is called with the reason whenever a drawn image is unsuitable.
    """

    records: RecordFolder
    cutouts: Sequence[CutoutFile | int]
    max_side: int
    fonts: FontLibrary | None
    refuse: Callable[[str], None]

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random scene.

        Raises:
          Unsuitable: if none of several images is suitable.
        """
        return self._draw(rng, len(self.records), lambda place: read_scene(self.records[place], self.max_side))

    def cutout(self, rng: np.random.Generator, suits: Callable[[Cutout], str | None] = lambda _: None) -> Cutout:
        """A random cut-out.

        Args:
          rng: source of random numbers.
          suits: function that returns the reason why a cut-out is unsuitable, or None.

        Raises:
          Unsuitable: if there are no cut-outs, or none of several is suitable.
        """

        def read(place: int) -> Cutout:
            entry = self.cutouts[place]
            cutout = entry.read() if isinstance(entry, CutoutFile) else cutout_of_record(self.records[entry])
            if reason := suits(cutout):
                raise Unsuitable(reason)
            return cutout

        if not self.cutouts:
            raise Unsuitable("no_cutouts")
        return self._draw(rng, len(self.cutouts), read)

    def _draw(self, rng: np.random.Generator, count: int, read: Callable[[int], Drawn]) -> Drawn:
        for attempt in range(ATTEMPTS):
            try:
                return read(int(rng.integers(count)))
            except Unsuitable as reason:
                if attempt == ATTEMPTS - 1:
                    raise
                self.refuse(str(reason))
        raise AssertionError("the last attempt returns or raises")


def shrink_scene(scene: Scene, *cutouts: Cutout, share: float) -> Scene:
    """Reduces a scene so that each object, enlarged at most slightly, can take a share of its shorter side."""
    side = min(MAX_ENLARGED * max(cutout.image.size) / share for cutout in cutouts)
    factor = max(MIN_SIDE, side) / min(scene.image.size)
    if factor >= 1:
        return scene
    width, height = scene.image.size
    return scene.resized((max(MIN_SIDE, round(width * factor)), max(MIN_SIDE, round(height * factor))))


def random_placement(
    rng: np.random.Generator,
    size: tuple[int, int],
    cutout: Cutout,
    *,
    share: tuple[float, float],
    across: tuple[float, float] = (0.0, 1.0),
) -> Placement:
    """A random placement in the lower part of an image, completely inside it.

    Args:
      rng: source of random numbers.
      size: width and height of the image.
      cutout: object to place.
      share: range of the object's longest side over the image's shorter side.
      across: range of the width that the object may use, as fractions.
    """
    width, height = size
    room = 0.94 * (across[1] - across[0]) * width
    largest = min(MAX_ENLARGED * max(cutout.image.size), share[1] * min(size))
    wanted = min(largest, max(share[0] * min(size), largest * float(rng.uniform(0.6, 1.0))))
    factor = min(wanted / max(cutout.image.size), room / cutout.image.width, 0.9 * height / cutout.image.height)
    object_width, object_height = (max(1, round(length * factor)) for length in cutout.image.size)
    left = across[0] * width + rng.uniform(0.03, 0.97) * ((across[1] - across[0]) * width - object_width)
    foot = min(height - 0.02 * height, max(object_height + 0.02 * height, rng.uniform(0.68, 0.96) * height))
    return Placement(object_width, object_height, round(left), round(foot) - object_height, random_slant(rng))


def random_slant(rng: np.random.Generator) -> float:
    """A random direction of light from the side, so that the shadow is visible next to its object."""
    return float(rng.choice((-1.0, 1.0)) * rng.uniform(0.4, 1.0))


def describe_position(placement: Placement, size: tuple[int, int]) -> tuple[str, str]:
    """The position of an object in words, in English and Chinese."""
    x = (placement.left + placement.width / 2) / size[0]
    y = (placement.top + placement.height / 2) / size[1]
    return POSITIONS[0 if y < 0.38 else 1 if y < 0.6 else 2][0 if x < 0.38 else 1 if x <= 0.62 else 2]


POSITIONS = (
    (("in the upper left", "左上方"), ("at the top", "上方"), ("in the upper right", "右上方")),
    (("on the left", "左侧"), ("in the middle", "中间"), ("on the right", "右侧")),
    (("in the lower left", "左下方"), ("at the bottom", "下方"), ("in the lower right", "右下方")),
)
