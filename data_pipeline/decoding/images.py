"""Decodes untrusted image files, under size limits, to upright 8-bit sRGB with or without alpha.

Pillow decodes in general. For ordinary JPEG files, simplejpeg decodes only the half size or only the grey levels, which
is faster. It is strict about damage; files that it refuses go to Pillow, so both decoders accept the same files.
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

from data_pipeline.decoding import colour, depths, jpeg
from data_pipeline.records.schema import MAX_IMAGE_BYTES
from qi2_jax.pixels import over_white

MAX_PIXELS = 100_000_000
MIN_HALVED_SIDE = 640  # pixels of the longer side from which the cheap filters use half the size
# Web formats whose decoders run inside this process. JPEG 2000 and HEIF are rare on the web, and icons are too small to
# train on. Other formats (PSD, DDS, PPM, ..) are working formats of programs that can convert them.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one core per worker process

_UINT16, _UINT32 = 2**16 - 1, 2**32 - 1  # largest orientation and length in EXIF
_ORIENTATION_TAG, _EXIF_IFD, _EXIF_WIDTH, _EXIF_HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
# EXIF 2.32, tag Orientation: the transform that turns the stored pixels upright.
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
_OPAQUE_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")


class UndecodableImage(ValueError):
    """An image that cannot be decoded. `reason` is one of REASONS; `detail` is the decoder's message."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


REASONS = {
    "empty": "the file has no bytes",
    "unknown_format": f"not an image in one of {FORMATS}",
    "too_many_pixels": f"the header announces more than {MAX_PIXELS:,} pixels, or an edit more than twice as many",
    "undecodable": "truncated or corrupt",
    "unsupported_mode": "pixels without an agreed conversion to 8-bit colour (32-bit integers, floats, Lab)",
}


@dataclass(frozen=True)
class Decoded:
    """A decoded image and the metadata of its file.

    Attributes:
      size: (width, height) of the upright image.
      format, mode: Pillow's names for the file's format and pixel mode. A JPEG file with several images (MPO) counts as
        JPEG.
      stored_size: (width, height) before turning.
      orientation: EXIF tag, or None without one. The TIFF decoder turns the image itself and leaves no tag. A number
        that exceeds the tag's 16 bits is reported as 65535, which is invalid too.
      exif_size: (width, height) according to EXIF, or None.
      xmp_orientation: orientation according to XMP, or None.
      data: bytes of the file.
      full: upright image, or None if only the half size has been decoded.
      half: upright image at half size, if a preview of a large JPEG file was requested.
      colour: outcome of the embedded colour profile, a key of `colour.OUTCOMES`.
    """

    size: tuple[int, int]
    format: str
    mode: str
    stored_size: tuple[int, int]
    orientation: int | None
    exif_size: tuple[int, int] | None
    xmp_orientation: int | None
    data: bytes
    full: Image.Image | None
    half: Image.Image | None = None
    colour: str = "untagged"

    @property
    def transform(self) -> str:
        """Pillow's name, in lower case, for the transform that turned the stored pixels upright, or `none`."""
        turn = TRANSFORMS.get(self.orientation)
        return "none" if turn is None else turn.name.lower()

    @functools.cached_property
    def image(self) -> Image.Image:
        """Upright sRGB image in mode RGB, or RGBA if a pixel is not opaque; the first frame of an animation."""
        return self.full or decode_image(self.data).image

    @functools.cached_property
    def preview(self) -> Image.Image:
        """Upright RGB image over white, at half size if the longer side has at least `MIN_HALVED_SIDE` pixels."""
        if self.half is not None:
            return self.half
        image = over_white(self.image)
        return image.reduce(2) if max(image.size) >= MIN_HALVED_SIDE else image

    @functools.cached_property
    def preview_grey(self) -> Image.Image:
        """Grey levels of `preview`, mode L."""
        return self.preview.convert("L")

    @functools.cached_property
    def grey(self) -> Image.Image:
        """Grey levels of the whole image over white, mode L."""
        if self.half is None or self.colour == "converted":  # the file's luma is in another colour space
            return over_white(self.image).convert("L")
        grey = jpeg.decode_grey(self.data)
        assert grey is not None, "the half size was decoded from the same file"
        return _upright(grey, self.orientation)


def decode_image(data: bytes, *, preview_first: bool = False, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes an image file completely and converts it to upright sRGB, mode RGB or RGBA.

    Embedded colour profiles are applied (`colour`). Pillow's global switches (`Image.MAX_IMAGE_PIXELS`,
    `ImageFile.LOAD_TRUNCATED_IMAGES`) do not change the result.

    Args:
      data: bytes of the file.
      preview_first: whether to decode only the half size of a large JPEG. Damage anywhere in the file is still
        detected. `Decoded.grey` and `Decoded.image` are decoded on access.
      max_pixels: limit on the pixels that the header announces, checked before any pixel is decoded.

    Raises:
      UndecodableImage: with one of REASONS. No other error leaves this function, whatever the bytes.
    """
    if not data:
        raise UndecodableImage("empty", "0 bytes")
    with _strict_pillow:
        file = _open(data, max_pixels)
        width, height = stored_size = file.size
        kind = "JPEG" if file.format == "MPO" else file.format or ""
        halves = preview_first and kind == "JPEG" and file.mode in ("L", "RGB") and max(stored_size) >= MIN_HALVED_SIDE
        half = jpeg.decode_half(data) if halves else None
        profile = colour.read_profile(file, data)
        try:
            image = _load(file, profile) if half is None else None
        except UndecodableImage:
            raise
        except Exception as error:
            raise UndecodableImage("undecodable", _detail(error)) from None
        orientation, exif_size, xmp_orientation = _read_orientation(file)
        if half is not None:
            half = _upright(profile.to_rgb(half), orientation)
    if image is not None:
        image = _upright(image, orientation)
        size = image.size
    else:
        size = (height, width) if orientation in QUARTER_TURNS else stored_size
    claims = orientation, exif_size, xmp_orientation
    return Decoded(size, kind, file.mode, stored_size, *claims, data, image, half, profile.outcome)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        try:
            file: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:
            # Pillow refuses PNG files whose profile is damaged or too large.
            if (plain := colour.without_png_profile(data)) is None:
                raise
            file = Image.open(io.BytesIO(plain), formats=("PNG",))
            file.info["icc_profile"] = b"damaged"
    except UnidentifiedImageError:
        raise UndecodableImage("unknown_format", f"begins with {data[:16]!r}") from None
    except Exception as error:  # decoders raise errors of any type on hostile bytes
        raise UndecodableImage("undecodable", _detail(error)) from None
    width, height = file.size
    if width * height > max_pixels:
        raise UndecodableImage("too_many_pixels", f"{width} x {height} of {max_pixels:,} allowed")
    return file


def read_image(path: pathlib.Path) -> Image.Image:
    """Reads an image file as an upright sRGB image in mode RGB, or RGBA if a pixel is not opaque.

    Raises:
      ValueError: if the path is not a file, the file is larger than `records.MAX_IMAGE_BYTES`, or it does not decode.
        The message names the path.
    """
    try:
        if not path.is_file():
            raise ValueError(f"image {path} is not a file")
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"image {path} has {size} bytes, above the limit of {MAX_IMAGE_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path} cannot be read: {error.strerror}") from None
    try:
        return decode_image(data).image
    except UndecodableImage as error:
        raise ValueError(f"image {path}: {error}") from error


def _upright(image: Image.Image, orientation: int | None) -> Image.Image:
    turn = TRANSFORMS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _load(image: Image.Image, profile: colour.Profile) -> Image.Image:
    raw = depths.raw_mode(image)
    image.load()
    deep = image.mode.startswith("I;16")
    image = depths.to_eight_bits(image, raw, profile.curve if deep else None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if bool(np.all(np.asarray(image.getchannel("A")) == 255)):
            image = image.convert("RGB")
    elif image.mode not in _OPAQUE_MODES:
        raise UndecodableImage("unsupported_mode", image.mode)
    if deep:  # its curve has been applied at full depth
        return image if image.mode == "RGBA" else image.convert("RGB")
    return profile.to_rgb(image)


def _read_orientation(image: Image.Image) -> tuple[int | None, tuple[int, int] | None, int | None]:
    """EXIF orientation, EXIF size and XMP orientation; each is None if it is missing or unreadable."""
    try:
        exif = image.getexif()
        details = exif.get_ifd(_EXIF_IFD)
        orientation, width, height = exif.get(_ORIENTATION_TAG), details.get(_EXIF_WIDTH), details.get(_EXIF_HEIGHT)
    except Exception:
        orientation, width, height = None, None, None
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    match = _XMP_ORIENTATION.search(xmp.encode(errors="replace") if isinstance(xmp, str) else bytes(xmp))
    if not isinstance(orientation, int):
        orientation = None
    elif not 0 <= orientation <= _UINT16:  # the tag may be stored with 64 bits
        orientation = _UINT16
    size = None
    if isinstance(width, int) and isinstance(height, int) and 0 < width <= _UINT32 and 0 < height <= _UINT32:
        size = width, height
    return orientation, size, int(match[1]) if match else None


def _detail(error: Exception) -> str:
    text = re.sub(r"0x[0-9a-fA-F]+", "0x...", f"{type(error).__name__}: {error}")  # addresses change between runs
    return text[:200].encode(errors="replace").decode()


class _StrictPillow:
    """Sets Pillow's global switches while at least one thread decodes.

    It also silences warnings, because bad files are counted by reason.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._before: tuple[int | None, bool] = (None, False)
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
                self._warnings = warnings.catch_warnings()  # can be entered only once
                self._warnings.__enter__()
                warnings.simplefilter("ignore")
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = self._before
                self._warnings.__exit__(None, None, None)


_strict_pillow = _StrictPillow()
