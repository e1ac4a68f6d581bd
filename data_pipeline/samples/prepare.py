"""Preparation: resizes and crops an upright image to exactly the size of its bucket."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.buckets import Bucket, crop_box
from qi2_jax.pixels import over_white


def prepare_image(image: Image.Image, bucket: Bucket, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Resizes an image to cover a bucket (Lanczos) and crops it to the centre.

    Args:
      image: upright RGB or RGBA image, as `decoding.images.decode_image` returns it.
      channels: 3 composites transparent parts over white; 4 keeps alpha, which is 255 for opaque images.

    Returns:
      Pixels [bucket.height, bucket.width, channels], 0..255. Resizing weights colours by alpha, so hidden colours do
      not bleed over edges. Fully transparent pixels are white, so they look right on white even without alpha.

    Raises:
      ValueError: for other modes or channels.
    """
    if image.mode not in ("RGB", "RGBA") or channels not in (3, 4):
        raise ValueError(f"mode {image.mode!r} with channels={channels}: give an RGB or RGBA image and ask for 3 or 4")
    image = over_white(image) if channels == 3 else image.convert("RGBA")
    box = crop_box(*image.size, bucket)
    resized = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    pixels = np.array(resized)  # a copy that may be written to
    if channels == 4:
        pixels[pixels[..., 3] == 0] = (255, 255, 255, 0)
    return pixels
