"""Decoding of images from outside, under limits, into upright 8-bit RGB or RGBA.

Pillow decodes. Of ordinary JPEG files the picture at half size and the grey levels can be had alone and faster, by
simplejpeg, which is strict about damage; what it refuses is Pillow's to judge, so that what decodes does not depend on
the way.
"""

import functools
import io
import pathlib
import re
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError

from data_pipeline.decoding import jpeg
from data_pipeline.records.schema import MAX_IMAGE_BYTES
from qi2_jax.pixels import over_white

MAX_PIXELS = 100_000_000
HALVED = 640  # pixels of the longer side from which half the size shows all that filters look for at first
# What the web serves, and only decoders that run inside this process. JPEG 2000 and HEIF hardly occur there; icons are
# too small to train on; the others (PSD, DDS, PPM, ..) belong to programs and can be converted by who has them.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # every worker process has a core of its own

_UINT16, _UINT32 = 2**16 - 1, 2**32 - 1  # the largest orientation and length that EXIF can state
_ORIENTATION_TAG, _EXIF_IFD, _EXIF_WIDTH, _EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
# EXIF 2.32, tag Orientation: what has to be done to the stored pixels to see the picture upright.
TRANSFORMS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)
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
    "too_many_pixels": f"a header announces over {MAX_PIXELS:,} pixels, or those of an edit over twice as many",
    "undecodable": "truncated or corrupt",
    "unsupported_mode": "pixels without an agreed meaning as 8-bit colour (32-bit integers, floats, Lab)",
}


@dataclass(frozen=True)
class Decoded:
    """A decoded image and what its file said about itself.

    Attributes:
      size: (width, height) upright.
      format, mode: of the file, as Pillow names them; several pictures in one JPEG file (MPO) are a JPEG too.
      stored_size: (width, height) before turning.
      orientation: the tag that was found after decoding (the TIFF decoder turns by itself and leaves none), or None;
        any number that the tag's 16 bits cannot hold is 65535, which means as little.
      exif_size: (width, height) of the picture that EXIF claims, or None.
      xmp_orientation: the orientation that XMP claims, or None.
      data: the file.
      whole: the upright picture, or None when so far only its half size was wanted.
      half: of a JPEG of which only that was wanted, the upright picture at half size.
    """

    size: tuple[int, int]
    format: str
    mode: str
    stored_size: tuple[int, int]
    orientation: int | None
    exif_size: tuple[int, int] | None
    xmp_orientation: int | None
    data: bytes
    whole: Image.Image | None
    half: Image.Image | None = None

    @property
    def transform(self) -> str:
        """What was done to the stored pixels, as Pillow names it in lower case; `none`."""
        turn = TRANSFORMS.get(self.orientation)
        return "none" if turn is None else turn.name.lower()

    @functools.cached_property
    def image(self) -> Image.Image:
        """Upright, mode RGB, or RGBA when at least one pixel is not opaque. The first frame of an animation."""
        return self.whole or decode_image(self.data).image

    @functools.cached_property
    def preview(self) -> Image.Image:
        """Upright, RGB, as on white paper, and at half size when its longer side has `HALVED` pixels or more."""
        if self.half is not None:
            return self.half
        image = over_white(self.image)
        return image.reduce(2) if max(image.size) >= HALVED else image

    @functools.cached_property
    def preview_grey(self) -> Image.Image:
        """`preview` in grey levels, mode L."""
        return self.preview.convert("L")

    @functools.cached_property
    def grey(self) -> Image.Image:
        """Grey levels of all pixels as on white paper, mode L."""
        if self.half is None:
            return over_white(self.image).convert("L")
        grey = jpeg.decode_grey(self.data)
        assert grey is not None, "the half size was decoded from the same file"
        return _turned(grey, self.orientation)


def decode_image(data: bytes, *, preview_first: bool = False, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes an image file completely, applies its orientation, and brings it to RGB or RGBA.

    The outcome does not depend on Pillow's global switches (`Image.MAX_IMAGE_PIXELS`,
    `ImageFile.LOAD_TRUNCATED_IMAGES`). Colour profiles are not applied.

    Args:
      preview_first: of a JPEG that is large enough, decode its half size alone, for which all of the file has to be
        in order; `Decoded.grey` and `Decoded.image` follow when they are asked for.
      max_pixels: an image whose header announces more is refused before any pixel is decoded.

    Raises:
      UndecodableImage: with one of REASONS; whatever the bytes, no other error leaves this function.
    """
    if not data:
        raise UndecodableImage("empty", "0 bytes")
    with _strict_pillow:
        try:
            file: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise UndecodableImage("unknown_format", f"begins with {data[:16]!r}") from None
        except Exception as error:  # decoders meet hostile bytes with errors of any type
            raise UndecodableImage("undecodable", _detail(error)) from None
        width, height = stored_size = file.size
        if width * height > max_pixels:
            raise UndecodableImage("too_many_pixels", f"{width} x {height} of {max_pixels:,} allowed")
        kind = "JPEG" if file.format == "MPO" else file.format or ""
        halves = preview_first and kind == "JPEG" and file.mode in ("L", "RGB") and max(stored_size) >= HALVED
        half = jpeg.decode_half(data) if halves else None
        try:
            image = _load(file) if half is None else None
        except UndecodableImage:
            raise
        except Exception as error:
            raise UndecodableImage("undecodable", _detail(error)) from None
        orientation, exif_size, xmp_orientation = _claims(file)
    if image is not None:
        image = _turned(image, orientation)
        size = image.size
    else:
        assert half is not None
        half = _turned(half, orientation)
        size = (height, width) if orientation in QUARTER_TURNS else stored_size
    return Decoded(size, kind, file.mode, stored_size, orientation, exif_size, xmp_orientation, data, image, half)


def read_image(path: pathlib.Path) -> Image.Image:
    """The picture in a file that a user names: upright, mode RGB, or RGBA when at least one pixel is not opaque.

    Raises:
      ValueError: naming the path, if it is no file, larger than `records.MAX_IMAGE_BYTES`, or holds no image.
    """
    try:
        if not path.is_file():
            raise ValueError(f"image {path} is no file")
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"image {path} has {size} bytes; at most {MAX_IMAGE_BYTES} are read")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path} cannot be read: {error.strerror}") from None
    try:
        return decode_image(data).image
    except UndecodableImage as error:
        raise ValueError(f"image {path}: {error}") from error


def _turned(image: Image.Image, orientation: int | None) -> Image.Image:
    turn = TRANSFORMS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _load(image: Image.Image) -> Image.Image:
    image.load()
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
    if not isinstance(orientation, int):
        orientation = None
    elif not 0 <= orientation <= _UINT16:  # a file may store the tag in 64 bits
        orientation = _UINT16
    size = None
    if isinstance(width, int) and isinstance(height, int) and 0 < width <= _UINT32 and 0 < height <= _UINT32:
        size = width, height
    return orientation, size, int(found[1]) if found else None


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
