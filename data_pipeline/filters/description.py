"""Description: the task, classes and languages that a record declares."""

from collections.abc import Sequence

from data_pipeline.filters.base import Candidate, Filter, Row, Settings, Threshold
from data_pipeline.filters.exemptions import SYNTHETIC
from data_pipeline.records.schema import INSTRUCTION, Record

DESCRIBES = "describes"  # reason for dropping an edit's caption that is not an instruction


def score(candidates: Sequence[Candidate]) -> list[dict]:
    """Columns of `DESCRIPTION` for each candidate."""
    return [_score(candidate.record) for candidate in candidates]


def _score(record: Record) -> dict:
    return {
        "conditions": len(record.conditions),
        "kinds": [caption.kind for caption in record.captions],
        "languages": [caption.language for caption in record.captions],
        "tags": list(record.tags),
        "source": record.source,
    }


def _drops(row: Row, settings: Settings) -> str | None:
    if row["description.conditions"]:
        return None if settings.edits else "edit"
    if not settings.synthetic and any(tag.startswith(SYNTHETIC) for tag in row["description.tags"]):
        return "synthetic"
    return None if settings.pairs else "pair"


def _drops_caption(row: Row, number: int, settings: Settings) -> str | None:
    """Drops captions of edits that are not instructions."""
    edit = bool(row["description.conditions"])
    return DESCRIBES if edit and row["description.kinds"][number] != INSTRUCTION else None


DESCRIPTION = Filter(
    name="description",
    version=1,
    columns={
        "conditions": (int, "condition images of an edit; 0: an image-text pair"),
        "kinds": (list[str], "kind of each caption, one of `records.KINDS`"),
        "languages": (list[str], "language of each caption according to the data set, or None"),
        "tags": (list[str], "classes of the image"),
        "source": (str, "name of the data set"),
    },
    score=score,
    thresholds=(
        Threshold(
            "pairs",
            True,
            "whether image-text pairs are kept",
            reason="pair",
        ),
        Threshold(
            "edits",
            True,
            "whether edits are kept",
            reason="edit",
        ),
        Threshold(
            "synthetic",
            True,
            "whether image-text pairs tagged `synthetic/..` are kept",
            reason="synthetic",
        ),
        Threshold(
            "max_per_class",
            0,
            "records kept per class (tag), drawn by the hash of their keys; 0: all. A record of several classes needs "
            "room in each; records without a class are always kept",
            low=0,
            high=1 << 62,
            reason="class_is_full",
        ),
    ),
    step="task",
    drops=_drops,
    drops_caption=_drops_caption,
    sees_broken=True,
)
