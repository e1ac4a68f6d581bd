"""Fast partial decoding of JPEG files, and a digest of their coded pixels."""

import hashlib

import simplejpeg
from PIL import Image

_SCAN, _ADOBE, _COMMENT = 0xDA, 0xEE, 0xFE
_APPLICATION = range(0xE0, 0xF0)


def decode_grey(data: bytes) -> Image.Image | None:
    """Decodes the luma channel (mode L) of an undamaged file of one or three components.

    Returns:
      The luma as the file stores it, without colour management, or None for a damaged file or other components.
    """
    return _decode(data, "GRAY", 1)


def decode_half(data: bytes) -> Image.Image | None:
    """Decodes the image (mode RGB) at half its width and height, rounded up.

    The whole file is read, so damage anywhere is detected. The inverse DCT and all later steps take a quarter of the
    time.

    Returns:
      The image without colour management; None in the cases of `decode_grey`.
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
    """SHA-256 of a file without its metadata, that is, without comments and without APPn segments except Adobe's.

    Files with equal digests have equal pixels before turning and colour management. A file that does not consist of
    segments is hashed as a whole.
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
