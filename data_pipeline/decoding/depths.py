"""Images with bit depths other than 8 per channel, and the transparent colours of PNG files."""

import numpy as np
from jaxtyping import Float
from PIL import Image, TiffTags

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
assert TiffTags.lookup(_PHOTOMETRIC).name == "PhotometricInterpretation"
_GREY_SCALES = {"L;2": 85, "L;4": 17}  # factors that Pillow applies to grey levels of 2 and 4 bits on reading


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for how the file stores a pixel, such as `RGB;16B`. It is only known before the image is loaded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def to_eight_bits(image: Image.Image, raw: str, curve: Float[np.ndarray, "256"] | None) -> Image.Image:
    """Converts a loaded image and its transparent colour, if any, to 8 bits per channel.

    Pillow itself keeps the high byte of 16-bit colour, but leaves 16-bit grey and transparent colours as they are.

    Args:
      image: loaded image, whose `info["transparency"]` may be changed.
      raw: `raw_mode` of the image.
      curve: for 16-bit grey, the sRGB level of each of 256 evenly spaced levels; None if the levels are sRGB.
    """
    transparent = image.info.get("transparency")
    if not image.mode.startswith("I;16"):
        if isinstance(transparent, int) and raw in _GREY_SCALES:
            image.info["transparency"] = transparent * _GREY_SCALES[raw]
        elif isinstance(transparent, tuple) and raw.startswith("RGB;16"):
            image.info["transparency"] = tuple(level >> 8 for level in transparent)
        return image
    stored = np.asarray(image).astype(np.uint16)  # from either byte order
    levels = stored << 4 if raw == "I;12" else stored
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 65535 - levels
    if curve is None:
        grey = (levels >> 8).astype(np.uint8)
    else:
        table = np.round(np.interp(np.arange(65536) / 257, np.arange(256), curve)).astype(np.uint8)
        grey = table[levels]
    if isinstance(transparent, int):
        alpha = np.where(stored == transparent, 0, 255).astype(np.uint8)
        return Image.fromarray(np.stack([grey, alpha], axis=-1))  # mode LA
    return Image.fromarray(grey)
