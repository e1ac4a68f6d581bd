"""Photographs to write on: records of a folder, or photographs from the scikit-image and scikit-learn wheels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.demo.dataset import package_folder
from data_pipeline.demo.images import PHOTOS
from data_pipeline.records.shards import RecordFolder
from data_pipeline.synthesis.lettering.typesetting import Unsuitable
from qi2_jax.pixels import over_white

MIN_SIDE = 240  # pixels; smaller images have no room for text


@dataclass(frozen=True)
class Scene:
    """An upright RGB image with its licence."""

    image: Image.Image
    licence: str | None


class Scenes:
    """Draws random images; it can be pickled for worker processes.

    Args:
      folder: folder of records; None for the photographs of scikit-image and scikit-learn.

    Raises:
      ValueError: if the folder has no records.
      ImportError: if these packages are not installed.
    """

    def __init__(self, folder: Path | None = None):
        self._records = RecordFolder(folder) if folder else None
        self._photos = () if folder else tuple(package_folder(photo.package) / photo.path for photo in PHOTOS)
        if self._records is not None and not len(self._records):
            raise ValueError(f"{folder} has no records to use as scenes")

    def draw(self, rng: np.random.Generator) -> Scene:
        """A random image.

        Raises:
          Unsuitable: with the reason `broken_scene`.
        """
        if self._records is not None:
            record = self._records[int(rng.integers(len(self._records)))]
            name, data, licence = record.key, record.image, record.licence
        else:
            number = int(rng.integers(len(PHOTOS)))
            name, data, licence = PHOTOS[number].name, self._photos[number].read_bytes(), PHOTOS[number].licence
        try:
            image = over_white(decode_image(data).image)
        except UndecodableImage:
            raise Unsuitable("broken_scene", name) from None
        if min(image.size) < MIN_SIDE:
            raise Unsuitable("broken_scene", name)
        return Scene(image, licence)
