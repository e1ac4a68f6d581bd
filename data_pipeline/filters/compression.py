"""Compression: how much of the picture the file format threw away."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.filters.base import Candidate, Filter

# Luminance table of JPEG (ITU-T T.81, table K.1), of which encoders use a multiple.
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
    width, height = candidate.whole.stored_size
    is_jpeg = candidate.whole.format == "JPEG"
    return {
        "jpeg_quality": _jpeg_quality(candidate.record.image) if is_jpeg else None,
        "bits_per_pixel": round(8 * len(candidate.record.image) / (width * height), 4),
    }


def _jpeg_quality(data: bytes) -> float | None:
    """The setting 1..100 with which libjpeg would have made the file's luminance table; None without a table.

    libjpeg scales the standard table by 5000 / q percent below 50, and by 200 - 2 q percent from there on.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:  # reads the header only
        tables = getattr(image, "quantization", {})
    if 0 not in tables:
        return None
    table = np.asarray(tables[0], dtype=np.float64)
    free = table < 255  # a baseline file cannot say more: these tell nothing of the scale
    if not free.any():
        return 1.0
    percent = 100 * float(table[free].sum() / LUMINANCE[free].sum())
    return round(min(100.0, max(1.0, 5000 / percent if percent > 100 else (200 - percent) / 2)), 1)


COMPRESSION = Filter(
    name="compression",
    version=2,
    columns={
        "jpeg_quality": (float, "1..100 as libjpeg counts, from the quantisation tables; None: no JPEG"),
        "bits_per_pixel": (float, "size of the file over its pixels"),
    },
    score=score,
)
