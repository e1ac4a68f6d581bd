"""Broken files, which do not decode completely within the limits of `decoding.images`, and formats of the others."""

from collections.abc import Sequence

from data_pipeline.decoding.colour import OUTCOMES
from data_pipeline.decoding.images import REASONS
from data_pipeline.filters.base import Candidate, Filter, Row, Settings


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `BROKEN` for each candidate."""
    return [_score(candidate) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    size = {"bytes": len(candidate.record.image)}
    if candidate.decoded is None:
        failure = candidate.failure
        assert failure is not None
        return {"reason": failure.reason, "detail": failure.detail, "format": None, "mode": None, "colour": None} | size
    decoded = candidate.decoded
    about = {"format": decoded.format, "mode": decoded.mode, "colour": decoded.colour}
    return {"reason": None, "detail": None} | about | size


def _drops(row: Row, settings: Settings) -> str | None:
    return row["broken.reason"]


BROKEN = Filter(
    name="broken",
    version=5,
    columns={
        "reason": (str, f"why the image or a condition image does not decode, one of {sorted(REASONS)}; None: it does"),
        "detail": (str, "the decoder's message, at most 200 characters"),
        "format": (str, "file format, such as JPEG"),
        "mode": (str, "pixel mode of the file, such as RGB, L, CMYK"),
        "colour": (str, f"outcome of the embedded colour profile, one of {sorted(OUTCOMES)}"),
        "bytes": (int, "size of the file"),
    },
    score=score,
    drops=_drops,
    sees_broken=True,
)
