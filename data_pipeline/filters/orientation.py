"""Orientation: how the pixels were turned upright, and whether the file's metadata about it is contradictory."""

from collections.abc import Sequence

from data_pipeline.decoding.images import TRANSFORMS, Decoded
from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold

CONTRADICTIONS = {
    "invalid_value": "the tag is not in 0..8 (0 is common and means unknown)",
    "xmp_disagrees": "EXIF and XMP name different orientations",
    "already_turned": "the tag asks for a quarter turn, but the stored size is the EXIF size with width and height "
    "swapped: a program turned the pixels but kept the tag, so another turn lays the image on its side",
}


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `ORIENTATION` for each candidate."""
    return [
        {
            "exif": candidate.target.orientation,
            "transform": candidate.target.transform,
            "contradiction": _contradiction(candidate.target),
        }
        for candidate in candidates
    ]


def _contradiction(decoded: Decoded) -> str | None:
    tag, xmp = decoded.orientation or 1, decoded.xmp_orientation or 1
    if not 1 <= tag <= 8:
        return "invalid_value"
    # The TIFF decoder has removed the tag, so there is nothing to compare.
    if decoded.format != "TIFF" and decoded.xmp_orientation is not None and xmp != tag:
        return "xmp_disagrees"
    width, height = decoded.stored_size
    if tag >= 5 and width != height and decoded.exif_size == (height, width):
        return "already_turned"
    return None


def _drops(row: Row, settings: Settings) -> str | None:
    return row["orientation.contradiction"] if settings.drop_contradictory_orientation else None


ORIENTATION = Filter(
    name="orientation",
    version=2,
    columns={
        "exif": (int, "orientation tag, 1..8 in EXIF; 65535: beyond 16 bits; None: no tag"),
        "transform": (
            str,
            f"transform of the stored pixels: none, {', '.join(t.name.lower() for t in TRANSFORMS.values())}",
        ),
        "contradiction": (str, f"one of {sorted(CONTRADICTIONS)}; None: no contradiction"),
    },
    score=score,
    thresholds=(
        Threshold(
            "drop_contradictory_orientation",
            True,
            "whether to drop files with contradictory metadata about their orientation",
            reason=", ".join(CONTRADICTIONS),
        ),
    ),
    drops=_drops,
)
