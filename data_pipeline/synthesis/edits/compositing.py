"""Composites objects with alpha into images: scaled, with a soft shadow on the ground, without halos."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

MAX_ENLARGED = 1.3  # largest factor by which a small cut-out is enlarged; more looks blurred
CAST, CONTACT = 0.55, 0.6  # alpha of the cast shadow at its darkest, and of the shadow directly under the object
FLAT, REACH = 0.25, 0.6  # height and sideways reach of a shadow, relative to the height of its object


@dataclass(frozen=True)
class Placement:
    """Size and top left corner of an object in pixels, and the direction of its shadow, -1 (left) .. 1 (right)."""

    width: int
    height: int
    left: int
    top: int
    slant: float

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.left + self.width, self.top + self.height


def resize_rgba(cutout: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an RGBA image; colours are weighted by alpha, so hidden colours do not bleed over edges."""
    return cutout.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def composite(scene: Image.Image, cutout: Image.Image, placement: Placement, *, shadow: bool = True) -> Image.Image:
    """Composites an object into an RGB scene."""
    layer = Image.new("RGBA", scene.size)
    layer.paste(resize_rgba(cutout, (placement.width, placement.height)), placement.box[:2])
    background = scene.convert("RGBA")
    if shadow:
        background = Image.alpha_composite(background, _shadow(layer, placement))
    return Image.alpha_composite(background, layer).convert("RGB")


def _shadow(layer: Image.Image, placement: Placement) -> Image.Image:
    """The object's silhouette, projected on the ground and fading with distance, and a dark rim at its foot."""
    alpha = layer.getchannel("A")
    height, foot = placement.height, placement.top + placement.height
    # Point (x, y) of the shadow comes from the silhouette at (x + slope * (y - foot), foot + (y - foot) / FLAT).
    slope = placement.slant * REACH / FLAT
    matrix = (1, slope, -slope * foot, 0, 1 / FLAT, foot - foot / FLAT)
    cast = alpha.transform(alpha.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    cast = cast.filter(ImageFilter.GaussianBlur(0.02 * height + 1))
    fading = np.clip(1 - (foot - np.arange(layer.height)) / (1.2 * FLAT * height), 0, 1)
    feet = Image.new("L", alpha.size)
    rim = foot - round(0.06 * height)
    feet.paste(alpha.crop((0, rim, alpha.width, alpha.height)), (0, rim + round(0.015 * height)))
    feet = feet.filter(ImageFilter.GaussianBlur(0.015 * height + 1))
    levels = CAST * np.asarray(cast, np.float32) * fading[:, None]
    black = Image.new("RGBA", layer.size)
    black.putalpha(Image.fromarray(np.maximum(levels, CONTACT * np.asarray(feet, np.float32)).astype(np.uint8)))
    return black
