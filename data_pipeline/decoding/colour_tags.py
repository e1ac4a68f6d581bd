"""Colour spaces that files name without an ICC profile: cICP, gAMA and cHRM in PNG, EXIF, and nclx in AVIF."""

from PIL import Image

_COLOUR_SPACE, _INTEROPERABILITY, _EXIF = 0xA001, 0xA005, 0x8769
_ADOBE, _UNCALIBRATED = 2, 0xFFFF
# ITU-T H.273: those of sRGB, BT.709 and BT.601, which nobody tells apart on a screen, and "unspecified".
_PRIMARIES, _TRANSFERS = (1, 2, 5, 6), (1, 2, 6, 13, 14, 15)
_SRGB_CHROMATICITY = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_SRGB_GAMMA = 1 / 2.2
_TOLERANCE = 0.02
_HEADER = 1 << 16  # bytes in which the tags of PNG and AVIF are sought


def names_other_space(image: Image.Image, data: bytes) -> bool:
    """Whether a file without a profile says that its pixels are not sRGB.

    Args:
      image: opened image.
      data: bytes of the file.
    """
    if image.format == "PNG":
        return _png_differs(image, data)
    if image.format == "AVIF":
        place = data[:_HEADER].find(b"colrnclx")
        return place >= 0 and not _is_srgb(*(int.from_bytes(data[place + at : place + at + 2]) for at in (8, 10)))
    return _exif_is_adobe(image)


def _is_srgb(primaries: int, transfer: int) -> bool:
    return primaries in _PRIMARIES and transfer in _TRANSFERS


def _png_differs(image: Image.Image, data: bytes) -> bool:
    head = data[:_HEADER].partition(b"IDAT")[0]
    if (place := head.find(b"\0\0\0\x04cICP")) >= 0 and len(head) >= place + 10:
        return not _is_srgb(head[place + 8], head[place + 9])
    if "srgb" in image.info:
        return False
    gamma, chromaticity = image.info.get("gamma", _SRGB_GAMMA), image.info.get("chromaticity", _SRGB_CHROMATICITY)
    far = (abs(one - other) > _TOLERANCE for one, other in zip(chromaticity, _SRGB_CHROMATICITY, strict=False))
    return abs(gamma - _SRGB_GAMMA) > _TOLERANCE or any(far)


def _exif_is_adobe(image: Image.Image) -> bool:
    """Whether EXIF names Adobe RGB: by its number, or as cameras do, as uncalibrated with the index R03."""
    try:
        exif = image.getexif()
        space, index = exif.get_ifd(_EXIF).get(_COLOUR_SPACE), exif.get_ifd(_INTEROPERABILITY).get(1)
        return space == _ADOBE or (space == _UNCALIBRATED and index == "R03")
    except Exception:  # Pillow raises errors of several types on hostile EXIF
        return False
