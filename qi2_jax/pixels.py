"""Conversions between images (Pillow), 8-bit pixels and the models' pixels in [-1, 1].

Dims: `H` `W` pixels, `c` image channels.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def over_white(image: Image.Image) -> Image.Image:
    """The image composited over white, in RGB; an image that is RGB already is returned unchanged.

    The rounding is that of the published pipeline (a paste with alpha as its mask).
    """
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def to_pixels(image: Image.Image, channels: int) -> Float[np.ndarray, "H W c"]:
    """The autoencoder's input, in [-1, 1]: with alpha (4 channels) or composited over white (3 channels)."""
    return normalize(np.asarray(image.convert("RGBA") if channels == 4 else over_white(image)))


def normalize(pixels: UInt8[np.ndarray, "*dims"]) -> Float[np.ndarray, "*dims"]:
    """8-bit pixels mapped from 0..255 to [-1, 1], in fp32."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_image(pixels: Float[np.ndarray, "H W c"]) -> UInt8[np.ndarray, "H W c"]:
    """Pixels in [-1, 1], clipped and rounded to 8 bits.

    Raises:
      ValueError: if a pixel is NaN or infinite.
    """
    if not np.isfinite(np.asarray(pixels, np.float32)).all():
        raise ValueError(
            "the model produced NaN or infinity: its weights are damaged, or the dtype of computation is too narrow "
            "for them"
        )
    return np.round(np.clip(np.asarray(pixels, np.float32) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
