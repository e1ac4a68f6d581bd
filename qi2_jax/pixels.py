"""Conversions between images and arrays of pixels.

Dims: `H` `W` pixels, `c` image channels."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def over_white(image: Image.Image) -> Image.Image:
    """The RGB image that a viewer sees on white paper; one that is RGB already is returned as it is.

    Rounded as the published pipeline rounds it (a paste under the mask of alpha).
    """
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def to_pixels(image: Image.Image, channels: int) -> Float[np.ndarray, "H W c"]:
    """An image as the autoencoder reads it: in [-1, 1], alpha kept (4 channels) or laid over white (3)."""
    image = image.convert("RGBA") if channels == 4 else over_white(image)
    return np.asarray(image, np.float32) / 127.5 - 1


def to_image(pixels: Float[np.ndarray, "H W c"]) -> UInt8[np.ndarray, "H W c"]:
    """Pixels in [-1, 1] rounded to 8 bits.

    Raises:
      ValueError: if one of them is not a number.
    """
    if not np.isfinite(np.asarray(pixels, np.float32)).all():
        raise ValueError("the model gave values that are not finite; its weights are broken, or dtype is too narrow")
    return np.round(np.clip(np.asarray(pixels, np.float32) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
