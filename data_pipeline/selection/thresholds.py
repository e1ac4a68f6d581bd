"""The thresholds of a training stage: one dataclass with a field for each threshold that a filter declares."""

import dataclasses
from typing import TYPE_CHECKING, Any

from data_pipeline.filters import CASCADE
from data_pipeline.filters.alignment import ALIGNMENT
from data_pipeline.filters.base import Threshold
from data_pipeline.filters.label_alignment import LABEL_ALIGNMENT
from data_pipeline.scoring.candidates import MAX_DISTANCE, MAX_GRADIENT
from data_pipeline.scoring.pair_scores import MIN_ENTROPY
from data_pipeline.scoring.pairs import MAX_DIFFERENCE

ALIGNMENTS = {filter.name: filter for filter in (ALIGNMENT, LABEL_ALIGNMENT)}

# Thresholds of the comparison between images (`scoring.pairs`), whose scores are not columns of a filter.
NEAR = (
    Threshold(
        "drop_near_duplicates",
        True,
        "whether to keep only one of each group of near duplicates: images whose hashes are within `near_distance` or "
        "`near_gradient` and whose thumbnails are within `near_difference`",
        reason="near",
    ),
    Threshold("near_distance", 8, "bits between two 64-bit perceptual hashes", low=0, high=MAX_DISTANCE),
    Threshold("near_gradient", 4, "bits between two 64-bit gradient hashes", low=0, high=MAX_GRADIENT),
    Threshold(
        "near_difference",
        9.0,
        "difference of two thumbnails in grey levels of 255 (`pairs.differences`)",
        low=0,
        high=MAX_DIFFERENCE,
    ),
    Threshold(
        "near_min_entropy",
        3.0,
        "bits of entropy; flatter images are never near duplicates, and are exempt from several filters",
        low=MIN_ENTROPY,
        high=8,
    ),
)
DECLARED = {one.name: one for one in (*(one for filter in CASCADE for one in filter.thresholds), *NEAR)}


class _Checks:
    """Checks the values of `Thresholds`, which inherits it.

    Raises:
      ValueError: for a value outside its range.
    """

    def __post_init__(self: Any) -> None:
        for name, one in DECLARED.items():
            if one.low is not None and not one.low <= getattr(self, name) <= one.high:
                raise ValueError(f"{name} is {getattr(self, name)}; choose between {one.low} and {one.high}")
        for least, most in (("min_tokens", "max_tokens"), ("min_brightness", "max_brightness")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                raise ValueError(f"{least} is {low}, above {most} {high}: nothing would be left")
        if self.alignment_by not in ALIGNMENTS:
            raise ValueError(f"alignment_by is {self.alignment_by!r}; choose one of {sorted(ALIGNMENTS)}")
        if unknown := sorted(set(self.require) - {filter.name for filter in CASCADE}):
            raise ValueError(f"require names unknown filters {unknown}")


if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True)
    class Thresholds(_Checks):
        """Requirements of a training stage for its records: a field for each of `DECLARED`, and `require`.

        `require` names filters whose missing scores are an error. Other filters without scores drop nothing, and
        selection warns. Broken images are always dropped.
        """

        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    Thresholds = dataclasses.make_dataclass(
        "Thresholds",
        [
            *((name, type(one.default), dataclasses.field(default=one.default)) for name, one in DECLARED.items()),
            ("require", tuple[str, ...], dataclasses.field(default=())),
        ],
        bases=(_Checks,),
        namespace={"__module__": __name__, "__doc__": "Requirements of a stage for its records; see `DECLARED`."},
        frozen=True,
    )
