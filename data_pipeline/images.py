"""Decoding of images from outside, under limits, into upright 8-bit RGB or RGBA."""

import io
import re
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # only decoders that run inside this process

_ORIENTATION_TAG, _EXIF_IFD, _EXIF_WIDTH, _EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
# EXIF 2.32, tag Orientation: what has to be done to the stored pixels to see the picture upright.
TRANSFORMS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)\s*(\d{1,3})')
_TO_RGB = ("1", "L", "P", "RGB", "CMYK", "YCbCr")


class UndecodableImage(ValueError):
    """An image that cannot be used. `reason` is one of REASONS, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


REASONS = {
    "empty": "the file has no bytes",
    "unknown_format": f"not an image in one of {FORMATS}",
    "too_many_pixels": f"the header announces more than {MAX_PIXELS:,} pixels",
    "undecodable": "truncated or corrupt",
    "unsupported_mode": "pixels without an agreed meaning as 8-bit colour (32-bit integers, floats, Lab)",
}


@dataclass(frozen=True)
class Decoded:
    """A decoded image and what its file said about itself.

    Attributes:
      image: upright, mode RGB, or RGBA when at least one pixel is not opaque. The first frame of an animation.
      format, mode: of the file, as Pillow names them.
      stored_size: (width, height) before turning.
      orientation: the tag that was found after decoding (the TIFF decoder turns by itself and leaves none), or None.
      exif_size: (width, height) of the picture that EXIF claims, or None.
      xmp_orientation: the orientation that XMP claims, or None.
    """

    image: Image.Image
    format: str
    mode: str
    stored_size: tuple[int, int]
    orientation: int | None
    exif_size: tuple[int, int] | None
    xmp_orientation: int | None


def decode_image(data: bytes) -> Decoded:
    """Decodes an image file completely, applies its orientation, and brings it to RGB or RGBA.

    The outcome does not depend on Pillow's global switches (`Image.MAX_IMAGE_PIXELS`,
    `ImageFile.LOAD_TRUNCATED_IMAGES`). Colour profiles are not applied.

    Raises:
      UndecodableImage: with one of REASONS; whatever the bytes, no other error leaves this function.
    """
    if not data:
        raise UndecodableImage("empty", "0 bytes")
    with _strict_pillow:
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # decoders meet hostile bytes with errors of any type
            raise UndecodableImage("unknown_format", f"begins with {data[:16]!r}") from None
        width, height = stored_size = image.size
        if width * height > MAX_PIXELS:
            raise UndecodableImage("too_many_pixels", f"{width} x {height}")
        try:
            image.load()
            rgb = _to_rgb(image)
        except UndecodableImage:
            raise
        except Exception as error:
            raise UndecodableImage("undecodable", _detail(error)) from None
        orientation, exif_size, xmp_orientation = _claims(image)
    if orientation in TRANSFORMS:
        rgb = rgb.transpose(TRANSFORMS[orientation])
    return Decoded(rgb, image.format or "", image.mode, stored_size, orientation, exif_size, xmp_orientation)


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image if bool(np.any(np.asarray(image.getchannel("A")) < 255)) else image.convert("RGB")
    if image.mode not in _TO_RGB:
        raise UndecodableImage("unsupported_mode", image.mode)
    return image.convert("RGB")


def _claims(image: Image.Image) -> tuple[int | None, tuple[int, int] | None, int | None]:
    """Orientation, size, and XMP orientation; metadata that cannot be read claims nothing."""
    try:
        exif = image.getexif()
        details = exif.get_ifd(_EXIF_IFD)
        orientation, width, height = exif.get(_ORIENTATION_TAG), details.get(_EXIF_WIDTH), details.get(_EXIF_HEIGHT)
    except Exception:
        orientation, width, height = None, None, None
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    found = _XMP_ORIENTATION.search(xmp.encode(errors="replace") if isinstance(xmp, str) else bytes(xmp))
    return (
        orientation if isinstance(orientation, int) else None,
        (width, height) if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0 else None,
        int(found[1]) if found else None,
    )


def _detail(error: Exception) -> str:
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", f"{type(error).__name__}: {error}")  # addresses differ from run to run
    return text[:200].encode(errors="replace").decode()


class _StrictPillow:
    """Sets Pillow's global switches for the time of a decode; threads may decode at the same time.

    Warnings are silenced too: bad files are counted by their reasons, and a million of them need no line each.
    """

    def __init__(self):
        self._lock, self._depth = threading.Lock(), 0
        self._before: tuple[int | None, bool] = (None, False)
        self._warnings = warnings.catch_warnings()

    def __enter__(self):
        with self._lock:
            if self._depth == 0:
                self._before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
                self._warnings = warnings.catch_warnings()  # an object of this kind is entered once
                self._warnings.__enter__()
                warnings.simplefilter("ignore")
            self._depth += 1

    def __exit__(self, *_):
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._before
                self._warnings.__exit__(None, None, None)


_strict_pillow = _StrictPillow()
