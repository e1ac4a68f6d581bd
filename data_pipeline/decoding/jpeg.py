"""JPEG files: their grey levels, or the picture at half size, at speed, and what identifies the coded picture."""

import hashlib

import simplejpeg
from PIL import Image

_SCAN, _ADOBE, _COMMENT = 0xDA, 0xEE, 0xFE
_APPLICATION = range(0xE0, 0xF0)


def decode_grey(data: bytes) -> Image.Image | None:
    """The grey picture (mode L) of an undamaged file of one or three components, as the file stores it: its luma.

    None: damaged in any way, or of other components.
    """
    return _decode(data, "GRAY", 1)


def decode_half(data: bytes) -> Image.Image | None:
    """The picture (mode RGB) at half of its width and height, rounded up, or None.

    All of the file is read, so damage anywhere is found; but what is left out of the transform to pixels, and of all
    that follows, saves three quarters of their time.
    """
    small = _decode(data, "RGBX", 2)
    return small and small.convert("RGB")


def _decode(data: bytes, colours: str, factor: int) -> Image.Image | None:
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        sizes = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
        pixels = simplejpeg.decode_jpeg(data, colours, strict=True, **sizes)
    except ValueError:
        return None
    mode = {"GRAY": "L"}.get(colours, colours)
    return Image.frombuffer(mode, pixels.shape[1::-1], pixels, "raw", mode, 0, 1)  # shares the memory


def coded_digest(data: bytes) -> str:
    """SHA-256 of the coded picture: of everything in the file but its metadata (APPn, save Adobe's, and comments).

    Files of equal digest have equal pixels before turning. A file that is no sequence of segments is taken whole.
    """
    digest, position = hashlib.sha256(), 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != _SCAN:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _ADOBE or (marker not in _APPLICATION and marker != _COMMENT):
            digest.update(data[position:end])
        position = end
    digest.update(memoryview(data)[position:])
    return digest.hexdigest()
