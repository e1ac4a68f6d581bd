"""What a record says of itself: columns by which selection can tell tasks, classes and languages apart."""

from collections.abc import Sequence

from data_pipeline.filters.base import Candidate, Filter


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `DESCRIPTION` for each candidate."""
    return [_score(candidate.record) for candidate in candidates]


def _score(record) -> dict:
    return {
        "conditions": len(record.conditions),
        "kinds": [caption.kind for caption in record.captions],
        "languages": [caption.language for caption in record.captions],
        "tags": list(record.tags),
        "source": record.source,
    }


DESCRIPTION = Filter(
    name="description",
    version=1,
    columns={
        "conditions": (int, "condition images of an edit; 0: an image-text pair"),
        "kinds": (list[str], "of each caption, one of `records.KINDS`"),
        "languages": (list[str], "of each caption, as the data set says; None: it does not"),
        "tags": (list[str], "classes of the picture"),
        "source": (str, "name of the data set"),
    },
    score=score,
    sees_broken=True,
)
