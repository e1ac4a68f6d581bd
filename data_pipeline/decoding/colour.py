"""Colour management: converts pixels with an embedded ICC profile to sRGB.

LittleCMS reads the profiles, which are untrusted. A profile that is too large, broken or for other pixels is ignored:
the pixels are taken as sRGB, as in a file without a profile. `Decoded.colour` records the outcome, a key of `OUTCOMES`,
so that a folder's files can be counted by it.
"""

import functools
import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms

from data_pipeline.decoding.colour_tags import names_other_space

MAX_PROFILE_BYTES = 4 << 20  # profiles of printing presses have 0.5 to 3 MB
OUTCOMES = {
    "untagged": "neither a profile nor tags of another colour space: the pixels are taken for sRGB",
    "unmanaged": "no profile, but tags of another colour space (cICP, gAMA, cHRM, nclx or EXIF): the pixels are taken "
    "for sRGB, and their colours are wrong",
    "srgb": "a profile that equals sRGB: the pixels stay as they are",
    "converted": "a profile of another colour space: the pixels were converted to sRGB",
    "ignored": f"a profile that is broken, larger than {MAX_PROFILE_BYTES:,} bytes, or for other pixels: the "
    "pixels are taken for sRGB",
}

_PIXEL_MODES = {
    "RGB": "RGB",
    "GRAY": "L",
    "CMYK": "CMYK",
}  # colour space of a profile: mode of the pixels that it describes
_DEVICES = ("scnr", "mntr", "prtr", "spac")  # classes of profiles that describe pixels
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_DIFFERENCE = 2  # levels by which a profile that counts as sRGB may differ from it; rounding alone gives 1
_MIN_RANGE = 64  # levels between black and white below which a profile cannot be right
_CACHED_PROFILES = 16  # a data set has few different profiles


class Profile:
    """The conversion of an image's pixels to sRGB.

    Attributes:
      outcome: key of OUTCOMES.
      transform: conversion of RGB or CMYK pixels to sRGB; None if there is nothing to convert or `curve` converts.
      curve: for grey pixels, the sRGB level 0..255 of each of 256 evenly spaced levels.
    """

    def __init__(
        self,
        outcome: str,
        transform: ImageCms.ImageCmsTransform | None = None,
        curve: Float[np.ndarray, "256"] | None = None,
    ):
        self.outcome, self.transform, self.curve = outcome, transform, curve

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """Pixels in sRGB: mode RGB, or RGBA for an image of this mode.

        Args:
          image: image of any mode that `convert("RGB")` accepts. For a profile of grey pixels, an image in mode L, or
            in mode RGB or RGBA with three equal channels.
        """
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        if self.transform is not None:
            pixels = image if image.mode == "CMYK" else image.convert("RGB")
            converted = ImageCms.applyTransform(pixels, self.transform)
            assert converted is not None
        elif self.curve is not None:
            table = np.round(self.curve).astype(np.uint8).tolist()
            grey = image if image.mode == "L" else image.getchannel(0)
            converted = grey.point(table).convert("RGB")
        else:
            return image if alpha is not None else image.convert("RGB")
        if alpha is not None:
            converted.putalpha(alpha)
        return converted


def read_profile(image: Image.Image, data: bytes) -> Profile:
    """The profile of an image that is open; its pixels need not be loaded yet. `data` are the bytes of the file."""
    profile = image.info.get("icc_profile")
    if not profile:
        return _UNMANAGED if names_other_space(image, data) else _UNTAGGED
    if not isinstance(profile, bytes) or len(profile) > MAX_PROFILE_BYTES:
        return _IGNORED
    return _build(profile, _profile_mode(image.mode))


def without_png_profile(data: bytes) -> bytes | None:
    """The PNG file without its profile chunk; None for other files and for PNG files without such a chunk."""
    position = len(_PNG)
    while data.startswith(_PNG) and position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        if name == b"iCCP" and end <= len(data):
            return data[:position] + data[end:]
        if name in (b"IDAT", b"IEND"):  # a profile comes before the pixels
            break
        position = end
    return None


def _profile_mode(mode: str) -> str:
    """The value in `_PIXEL_MODES` that describes an image's pixels."""
    if mode in ("1", "L", "LA") or mode.startswith("I;16"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@functools.lru_cache(_CACHED_PROFILES)
def _build(data: bytes, kind: str) -> Profile:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(data))
        about = source.profile
        if _PIXEL_MODES.get(about.xcolor_space.strip()) != kind or about.device_class not in _DEVICES:
            return _IGNORED
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            kind,
            "RGB",
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
            # By default LittleCMS approximates grey with a few points, coarsely in the shadows.
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | (ImageCms.Flags.NOOPTIMIZE if kind == "L" else 0),
        )
        black, white = (_probe(transform, kind, colour).mean() for colour in _black_and_white(kind))
        if white - black < _MIN_RANGE:
            return _IGNORED
        if kind == "L":
            levels = np.arange(256, dtype=np.uint8)
            # One channel gives all three, so a grey pixel stays grey.
            curve = _probe(transform, kind, levels[None])[0, :, 1].astype(np.float64)
            return _SRGB if np.abs(curve - levels).max() <= _MAX_DIFFERENCE else Profile("converted", curve=curve)
        if kind == "RGB" and np.abs(_probe(transform, kind, _GRID).astype(int) - _GRID).max() <= _MAX_DIFFERENCE:
            return _SRGB
    except Exception:  # LittleCMS and its binding raise errors of several types on hostile profiles
        return _IGNORED
    return Profile("converted", transform)


def _probe(
    transform: ImageCms.ImageCmsTransform, kind: str, colours: UInt8[np.ndarray, "h w ..."]
) -> UInt8[np.ndarray, "h w 3"]:
    image = Image.frombytes(kind, colours.shape[1::-1], colours.tobytes())
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return np.asarray(converted)


def _black_and_white(kind: str) -> tuple[UInt8[np.ndarray, "1 1 ..."], UInt8[np.ndarray, "1 1 ..."]]:
    low, high = (np.full((1, 1) if kind == "L" else (1, 1, len(kind)), level, np.uint8) for level in (0, 255))
    return (high, low) if kind == "CMYK" else (low, high)  # ink darkens


_LEVELS = np.arange(0, 256, 15, dtype=np.uint8)
_GRID = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), axis=-1).reshape(1, -1, 3)  # 5,832 colours
_UNTAGGED, _UNMANAGED, _SRGB, _IGNORED = map(Profile, ("untagged", "unmanaged", "srgb", "ignored"))
