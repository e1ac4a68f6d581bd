"""Compression: how much detail lossy compression has removed from the image."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.filters.base import Candidate, Exemption, Filter, Row, Settings, Threshold
from data_pipeline.filters.exemptions import FLAT

# Luminance quantisation table of JPEG (ITU-T T.81, table K.1), which encoders scale.
LUMINANCE = np.array(
    [
        *(16, 11, 10, 16, 24, 40, 51, 61),
        *(12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56),
        *(14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77),
        *(24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101),
        *(72, 92, 95, 98, 112, 100, 103, 99),
    ]
)


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `COMPRESSION` for each candidate."""
    return [_score(candidate) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    width, height = candidate.target.stored_size
    is_jpeg = candidate.target.format == "JPEG"
    return {
        "jpeg_quality": _jpeg_quality(candidate.record.image) if is_jpeg else None,
        "lossless": _is_lossless(candidate.target.format, candidate.record.image),
        "bits_per_pixel": round(8 * len(candidate.record.image) / (width * height), 4),
    }


def _jpeg_quality(data: bytes) -> float | None:
    """libjpeg's quality setting, 1..100, for the file's luminance table; None without a table.

    libjpeg scales the standard table by 5000 / q percent for q below 50, and by 200 - 2 q percent otherwise.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header only
        tables = getattr(image, "quantization", {})
    if 0 not in tables:
        return None
    table = np.asarray(tables[0], dtype=np.float64)
    unclipped = table < 255  # entries of a baseline file are clipped at 255
    if not unclipped.any():
        return 1.0
    percent = 100 * float(table[unclipped].sum() / LUMINANCE[unclipped].sum())
    return round(min(100.0, max(1.0, 5000 / percent if percent > 100 else (200 - percent) / 2)), 1)


def _is_lossless(format: str, data: bytes) -> bool:
    """Whether the file's compression keeps every pixel. AVIF counts as lossy, since its lossless mode is rare."""
    if format == "WEBP":
        return _webp_codec(data) == b"VP8L"
    if format == "TIFF":
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:  # reads the header only
            return image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
    return format in ("PNG", "GIF", "BMP")


def _webp_codec(data: bytes) -> bytes:
    """The chunk with the pixels of a WebP file, `VP8 ` or `VP8L`; for an animation, that of the first frame."""
    position = 12
    while (name := data[position : position + 4]) not in (b"VP8 ", b"VP8L", b""):
        if name == b"ANMF":
            position += 24  # its chunks follow 16 bytes about the frame
        else:
            size = int.from_bytes(data[position + 4 : position + 8], "little")
            position += 8 + size + size % 2
    return name


def _is_not_jpeg(row: Row, settings: Settings) -> bool:
    return row["compression.jpeg_quality"] is None


_OTHER_FORMAT = Exemption("files that are not JPEG", _is_not_jpeg)

COMPRESSION = Filter(
    name="compression",
    version=3,
    columns={
        "jpeg_quality": (float, "libjpeg quality 1..100, from the quantisation tables; None: not a JPEG"),
        "lossless": (bool, "whether the file's compression is lossless"),
        "bits_per_pixel": (float, "bits of the file per pixel"),
    },
    score=score,
    thresholds=(
        Threshold(
            "min_jpeg_quality",
            0.0,
            "quality of JPEG files, 1..100",
            low=0,
            high=100,
            column="jpeg_quality",
            reason="compressed_too_much",
        ),
        Threshold(
            "min_bits_per_pixel",
            0.0,
            "bits per pixel of JPEG files",
            low=0,
            high=1e3,
            column="bits_per_pixel",
            reason="compressed_too_much",
            exempt=(_OTHER_FORMAT, FLAT),
            logarithmic=True,
        ),
    ),
)
