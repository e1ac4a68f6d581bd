"""Why a record or a caption is dropped, from its scores and the thresholds of a stage; None if it is kept.

Every filter declares its rule; this module orders the rules, and `select` applies them.
"""

from collections.abc import Callable

from data_pipeline.filters import CASCADE
from data_pipeline.filters.base import Row
from data_pipeline.filters.description import DESCRIBES
from data_pipeline.selection.thresholds import Thresholds

CAPTIONS = "captions"  # step of the rules that look at captions
_CAPTION_RULES = [filter.drops_caption for filter in CASCADE if filter.drops_caption is not None]


def caption_reasons(row: Row, thresholds: Thresholds) -> list[str | None]:
    """Why each caption of a record is dropped; None if it is kept."""
    numbers = range(len(row["description.kinds"]))
    results = ((rule(row, number, thresholds) for rule in _CAPTION_RULES) for number in numbers)
    return [next((reason for reason in reasons if reason is not None), None) for reasons in results]


def _captions(row: Row, thresholds: Thresholds) -> str | None:
    """If no caption is left, the reason of the first caption that could have been used."""
    reasons = caption_reasons(row, thresholds)
    return None if None in reasons else next((reason for reason in reasons if reason != DESCRIBES), "no_caption")


def _rules() -> dict[str, Callable[[Row, Thresholds], str | None]]:
    rules: dict[str, Callable[[Row, Thresholds], str | None]] = {}
    for filter in CASCADE:
        if filter.step == CAPTIONS:
            rules.setdefault(CAPTIONS, _captions)
        elif filter.drops is not None or any(threshold.column for threshold in filter.thresholds):
            rules[filter.step or filter.name] = filter.reason
    return rules


# {step of the funnel: its rule}, in the order of application. Duplicates are dropped afterwards, so that the kept copy
# has passed all rules.
RULES = _rules()
