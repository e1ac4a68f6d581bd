"""Broken files: what does not decode completely under the limits of `images`."""

from collections.abc import Sequence

from data_pipeline.filters.base import Filter, Sample
from data_pipeline.images import REASONS


def score(samples: Sequence[Sample]) -> list[dict]:
    """Columns of `BROKEN` for each sample."""
    return [_score(sample) for sample in samples]


def _score(sample: Sample) -> dict:
    size = len(sample.record.image)
    if sample.decoded is None:
        failure = sample.failure
        return {"reason": failure.reason, "detail": failure.detail, "format": None, "mode": None, "bytes": size}
    return {"reason": None, "detail": None, "bytes": size} | {
        "format": sample.decoded.format,
        "mode": sample.decoded.mode,
    }


BROKEN = Filter(
    name="broken",
    version=1,
    columns={
        "reason": f"why the image does not decode, one of {sorted(REASONS)}; None: it does",
        "detail": "the decoder's words, at most 200 characters",
        "format": "file format, such as JPEG",
        "mode": "pixel mode of the file, such as RGB, L, CMYK",
        "bytes": "size of the file",
    },
    score=score,
    sees_broken=True,
)
