"""Duplicates: fingerprints of every image. `data_pipeline.scoring.pairs` compares them.

An edit is fingerprinted as a whole: its target, its sources in order, and its instructions. It therefore never equals
an image-text pair, nor an edit of the same images with another instruction.

Three fingerprints are computed over white: the 64-bit perceptual hash (signs of the lowest DCT coefficients), the
64-bit gradient hash (whether each of 9 x 8 cells is brighter than its left neighbour), and a thumbnail of brightness
and colour. `pairs` explains how they are compared and what was measured.
"""

import base64
import hashlib
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.decoding import jpeg
from data_pipeline.decoding.images import Decoded
from data_pipeline.filters.base import Candidate, Filter, Threshold
from data_pipeline.records.schema import INSTRUCTION

SIDE = 32  # cells per side of the input of the hashes
FINE_SIDE, COLOUR_SIDE = 64, 16  # cells per side of the thumbnail: brightness, and each of two colour channels
THUMBNAIL = FINE_SIDE**2 + 2 * COLOUR_SIDE**2  # bytes per image
REDUCING_GAP = 3.0  # Pillow then reduces in two steps, in a quarter of the time and with nearly the same result
_COSINES = 2 * np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))  # DCT-II
HASH = 16  # hexadecimal digits of a hash


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `DUPLICATES` for each candidate."""
    return [_score(candidate) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    record, decoded = candidate.record, (candidate.target, *candidate.conditions)
    files = [hashlib.sha256(data).hexdigest() for data in (record.image, *record.conditions)]
    pixels = [_pixels(image) for image in decoded]
    thumbnails = [thumbnail(image.preview) for image in decoded]
    row = {
        "bytes_sha256": files[0],
        "pixels_sha256": pixels[0],
        "phash": "".join(perceptual_hash(_luma(one)) for one in thumbnails),
        "dhash": "".join(gradient_hash(_luma(one)) for one in thumbnails),
        "thumbnail": base64.b64encode(b"".join(thumbnails)).decode(),
        "edit": None,
        "edit_pixels": None,
    }
    if record.conditions:
        texts = [caption.text for caption in record.captions if caption.kind == INSTRUCTION]
        row["edit"] = _digest([len(decoded), *texts])
        row["bytes_sha256"] = _digest([row["edit"], *files])
        row["pixels_sha256"] = _digest([row["edit"], *pixels])
        row["edit_pixels"] = "".join(digest[:HASH] for digest in pixels)
    return row


def _pixels(decoded: Decoded) -> str:
    if decoded.format == "JPEG" and decoded.colour != "converted":  # a converting profile changes the pixels
        return _digest([jpeg.coded_digest(decoded.data), decoded.transform])
    image = decoded.image
    digest = hashlib.sha256(f"{image.mode} {image.width} {image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def thumbnail(image: Image.Image) -> bytes:
    """`THUMBNAIL` bytes of an RGB image: FINE_SIDE**2 of luma, then COLOUR_SIDE**2 each of Cb and Cr."""
    size = FINE_SIDE, FINE_SIDE
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=REDUCING_GAP).convert("YCbCr")
    luma, *colour = small.split()
    smaller = (channel.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX) for channel in colour)
    return b"".join(channel.tobytes() for channel in (luma, *smaller))


def _luma(thumbnail: bytes) -> UInt8[np.ndarray, "s s"]:
    return coarse(np.frombuffer(thumbnail, np.uint8, FINE_SIDE**2).reshape(FINE_SIDE, FINE_SIDE))


def coarse(fine: UInt8[np.ndarray, "*n s s"]) -> UInt8[np.ndarray, "*n t t"]:
    """Channels of thumbnails at half the resolution: each cell is the rounded mean of four."""
    rows = fine[..., 0::2, :].astype(np.uint16) + fine[..., 1::2, :]
    return ((rows[..., 0::2] + rows[..., 1::2] + 2) // 4).astype(np.uint8)


def perceptual_hash(luma: UInt8[np.ndarray, "s s"]) -> str:
    """Signs, relative to their median, of the 8 x 8 lowest DCT coefficients of SIDE x SIDE pixels, in hex.

    It equals `phash` of the package imagehash for such an image.
    """
    low = np.round(_COSINES @ luma.astype(np.float64) @ _COSINES.T, 6)  # removes rounding errors around 0
    return np.packbits(low > np.sort(low, axis=None)[31:33].mean()).tobytes().hex()


def gradient_hash(luma: UInt8[np.ndarray, "s s"]) -> str:
    """Whether each of 8 x 8 cells is darker than its right neighbour, in hex: `dhash` of the package imagehash."""
    cells = np.asarray(Image.fromarray(luma).resize((9, 8), Image.Resampling.LANCZOS))
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def _digest(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


DUPLICATES = Filter(
    name="duplicates",
    version=5,
    columns={
        "bytes_sha256": (str, "hash of the file; for an edit, of all its files and instructions"),
        "pixels_sha256": (
            str,
            "hash without metadata. JPEG: coded data and orientation. Other formats, and images with converted "
            "colours: size and pixels, so copies in other lossless formats are equal",
        ),
        "phash": (str, f"64-bit perceptual hash, {HASH} hexadecimal digits for the image and each source"),
        "dhash": (str, "64-bit gradient hash, in the same form"),
        "thumbnail": (str, f"base64 of {THUMBNAIL} bytes of `thumbnail` for the image and each source"),
        "edit": (str, "hash of the number of images and the instructions of an edit; None for an image-text pair"),
        "edit_pixels": (str, f"for an edit, {HASH} digits of the pixel hash of every image"),
    },
    score=score,
    thresholds=(
        Threshold(
            "drop_exact_duplicates",
            True,
            "whether to keep only one of several files with the same bytes or the same pixels",
            reason="same_bytes, same_pixels",
        ),
    ),
)
