"""Scenes: the images of a records folder from which edits are made."""

from dataclasses import dataclass

from PIL import Image

from data_pipeline.decoding.images import UndecodableImage, decode_image
from data_pipeline.records.schema import Caption, Record
from data_pipeline.synthesis.edits.cutouts import Unsuitable

MIN_SIDE = 256
MAX_ASPECT = 3.0
MIN_BITS = 4.5  # entropy of grey levels; flat designs have less, photographs around 7


@dataclass(frozen=True)
class Scene:
    """An image of a record.

    Attributes:
      image: RGB image.
      stored: original file, if it decodes to exactly `image`; None if the image was reduced or cropped.
      name: key of the record.
      source, licence, captions: fields of the record.
    """

    image: Image.Image
    stored: bytes | None
    name: str
    source: str
    licence: str | None
    captions: tuple[Caption, ...] = ()

    def resized(self, size: tuple[int, int]) -> "Scene":
        """The scene, resized to cover a size and cropped to it around the centre."""
        if size == self.image.size:
            return self
        factor = max(size[0] / self.image.width, size[1] / self.image.height)
        left = max(0.0, (self.image.width - size[0] / factor) / 2)  # rounding could give a value below 0
        top = max(0.0, (self.image.height - size[1] / factor) / 2)
        box = (left, top, self.image.width - left, self.image.height - top)
        image = self.image.resize(size, Image.Resampling.LANCZOS, box=box)
        return Scene(image, None, self.name, self.source, self.licence, self.captions)


def read_scene(record: Record, max_side: int) -> Scene:
    """Reads the image of a pair, reduced to at most `max_side` pixels.

    Raises:
      Unsuitable: with the reason.
    """
    if record.conditions:
        raise Unsuitable("picture_is_an_edit")
    try:
        image = decode_image(record.image).image
    except UndecodableImage:
        raise Unsuitable("picture_undecodable") from None
    if image.mode == "RGBA":
        raise Unsuitable("picture_transparent")
    if min(image.size) < MIN_SIDE:
        raise Unsuitable("picture_too_small")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise Unsuitable("picture_too_long")
    if image.convert("L").entropy() < MIN_BITS:
        raise Unsuitable("picture_flat")
    scene = Scene(image, record.image, record.key, record.source, record.licence, record.captions)
    if max(image.size) <= max_side:
        return scene
    factor = max(max_side / max(image.size), MIN_SIDE / min(image.size))
    return scene.resized((max(MIN_SIDE, round(image.width * factor)), max(MIN_SIDE, round(image.height * factor))))
