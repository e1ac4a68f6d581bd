"""Broken files: what does not decode completely under the limits of `images`."""

from collections.abc import Sequence

from data_pipeline.decoding.images import REASONS
from data_pipeline.filters.base import Candidate, Filter


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `BROKEN` for each candidate."""
    return [_score(candidate) for candidate in candidates]


def _score(candidate: Candidate) -> dict:
    size = {"bytes": len(candidate.record.image)}
    if candidate.decoded is None:
        failure = candidate.failure
        assert failure is not None
        return {"reason": failure.reason, "detail": failure.detail, "format": None, "mode": None} | size
    return {"reason": None, "detail": None, "format": candidate.decoded.format, "mode": candidate.decoded.mode} | size


BROKEN = Filter(
    name="broken",
    version=3,
    columns={
        "reason": (str, f"why the image or a condition image does not decode, one of {sorted(REASONS)}; None: it does"),
        "detail": (str, "the decoder's words, at most 200 characters"),
        "format": (str, "file format, such as JPEG"),
        "mode": (str, "pixel mode of the file, such as RGB, L, CMYK"),
        "bytes": (int, "size of the file"),
    },
    score=score,
    sees_broken=True,
)
