"""Resolution: size and shape of the upright image."""

from collections.abc import Sequence

from data_pipeline.filters.base import Candidate, Filter, Threshold


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `RESOLUTION` for each candidate."""
    return [_score(*candidate.target.size) for candidate in candidates]


def _score(width: int, height: int) -> dict:
    short, long = min(width, height), max(width, height)
    return {"width": width, "height": height, "short_side": short, "pixels": width * height, "aspect": long / short}


RESOLUTION = Filter(
    name="resolution",
    version=1,
    columns={
        "width": (int, "pixels, upright"),
        "height": (int, "pixels, upright"),
        "short_side": (int, "pixels of the shorter side"),
        "pixels": (int, "width times height"),
        "aspect": (float, "longer side over shorter side, >= 1"),
    },
    score=score,
    thresholds=(
        Threshold(
            "min_side",
            256,
            "pixels of the shorter side",
            low=1,
            high=1 << 20,
            column="short_side",
            reason="too_small",
            logarithmic=True,
        ),
        Threshold(
            "max_aspect",
            3.0,
            "longer side over shorter side",
            low=1,
            high=1e6,
            column="aspect",
            keeps="below",
            reason="too_long",
            logarithmic=True,
        ),
    ),
)
